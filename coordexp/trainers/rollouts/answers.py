"""From questions to training targets: generate, parse, match, build.

Both stage-2 variants use it, in training and in evaluation. Nothing is remembered between steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.forms.choose import form_of
from coordexp.codec.parse import ParsedRollout
from coordexp.config.schema.rollout import Matching
from coordexp.control.schedule import rollout_seed_base
from coordexp.data.raw_samples import RawSample
from coordexp.matching import MatchResult, match_objects
from coordexp.rollout.session.session import RolloutSession
from coordexp.rollout.types import Rollout
from coordexp.targets.builder import TargetBuilder
from coordexp.targets.sample import EncodedSample
from coordexp.trainers.rollouts.metrics import RolloutOutcome


@dataclass(frozen=True)
class JudgedAnswer:
    """What the model wrote for one sample, and what it is worth."""

    raw: RawSample
    rollout: Rollout
    parsed: ParsedRollout
    match: MatchResult


@dataclass(frozen=True)
class RolledOut:
    """The rollouts of a rank in one step, with the wall time of each part in seconds."""

    outcomes: tuple[RolloutOutcome, ...]
    answers: tuple[JudgedAnswer, ...]
    generate_s: float
    parse_match_s: float
    encode_s: float
    num_answers: int = 1
    """To each question; those to one stand one after another."""
    teaches_best: bool = False
    """Only the best answer to each question is taught, not all."""

    @property
    def samples(self) -> list[EncodedSample]:
        """What is trained on; rollouts that gave no sample are left out."""
        taught = [self.outcomes[index].sample for index in self.taught]
        return [sample for sample in taught if isinstance(sample, EncodedSample)]

    @property
    def taught(self) -> list[int]:
        """Indices of the answers that are taught, ascending."""
        if not self.teaches_best:
            return list(range(len(self.answers)))
        starts = range(0, len(self.answers), self.num_answers)
        return [start + best_of(self.answers[start : start + self.num_answers]) for start in starts]


def best_of(answers: Sequence[JudgedAnswer]) -> int:
    """The answer with most matched objects; of several the one with fewest others, of those the first."""

    def worth(index: int) -> tuple[int, int, int]:
        answer = answers[index]
        num_matched = 0 if answer.parsed.prefix_is_fallback else len(answer.match.matched)
        return num_matched, -len(answer.match.unmatched_pred), -index

    return max(range(len(answers)), key=worth)


class AnswerJudge:
    """Parses an answer strictly and matches it with the ground truth.

    Arguments:
        matching: `rollout_matching.matching`.
        form: of the answers; None: CoordJSON.
        allow_poly: False refuses predicted polygons (reason `poly_unsupported`).
    """

    def __init__(
        self,
        tokenizer: Any,
        matching: Matching,
        *,
        form: AnswerForm | None = None,
        allow_poly: bool = True,
    ) -> None:
        self._tokenizer, self._matching = tokenizer, matching
        self._form, self._allow_poly = form or form_of(), allow_poly

    def __call__(self, raw: RawSample, rollout: Rollout, *, gate: float | None = None) -> JudgedAnswer:
        """gate: in place of `matching.maskiou_gate`."""
        parsed = self._form.parse(rollout.response_token_ids, self._tokenizer, allow_poly=self._allow_poly)
        match = match_objects(
            parsed.objects,
            raw.objects,
            top_k=self._matching.candidate_top_k,
            gate=self._matching.maskiou_gate if gate is None else gate,
            resolution=self._matching.maskiou_resolution,
            fp_cost=self._matching.fp_cost,
            fn_cost=self._matching.fn_cost,
        )
        return JudgedAnswer(raw, rollout, parsed, match)


class AnswerTeacher:
    """Training samples from the model's own answers: its prefix as it stands, and the objects it missed.

    Arguments:
        policy_version: of optimizer step s; answers of any other version are refused.
        seed: of the run.  first_index: index of this rank's first question among those of all ranks.
        num_answers: to each question, each with a seed and a target of its own.
        teaches_best: only the best answer to each question is taught (`best_of`), not all.
        generating: what the time of generating is taken with.
    """

    def __init__(
        self,
        session: RolloutSession,
        judge: AnswerJudge,
        builder: TargetBuilder,
        *,
        policy_version: Callable[[int], int],
        seed: int,
        first_index: int = 0,
        num_answers: int = 1,
        teaches_best: bool = False,
        generating: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._session, self._judge, self._builder = session, judge, builder
        self._generating = generating
        self._policy_version, self._seed, self._first_index = policy_version, seed, first_index
        self._num_answers, self._teaches_best = num_answers, teaches_best

    def __call__(self, raws: Sequence[RawSample], step: int) -> RolledOut:
        """Answers of the policy as it is before optimizer step `step`, and a target from each. Collective.

        Several answers to a question stand one after another.
        """
        started = time.perf_counter()
        asked = [raw for raw in raws for _ in range(self._num_answers)]
        chunks = self._session.generate_all(
            asked,
            version=self._policy_version(step),
            seed_base=rollout_seed_base(self._seed, step),
            first_index=self._first_index * self._num_answers,
        )
        with self._generating():
            rollouts = [rollout for _, chunk in chunks for rollout in chunk]
        generated = time.perf_counter()
        answers = [self._judge(raw, rollout) for raw, rollout in zip(asked, rollouts, strict=True)]
        judged = time.perf_counter()
        outcomes = [self._outcome(answer) for answer in answers]
        return RolledOut(
            outcomes=tuple(outcomes),
            answers=tuple(answers),
            generate_s=generated - started,
            parse_match_s=judged - generated,
            encode_s=time.perf_counter() - judged,
            num_answers=self._num_answers,
            teaches_best=self._teaches_best,
        )

    def _outcome(self, answer: JudgedAnswer) -> RolloutOutcome:
        raw = answer.raw
        sample = self._builder.from_rollout(
            raw.prompt_ids,
            answer.parsed,
            answer.match,
            raw.objects,
            generation_prompt_ids=answer.rollout.prompt_token_ids,
            sample_id=raw.sample_id,
            media=raw.media,
        )
        return RolloutOutcome(answer.rollout, answer.parsed, answer.match, len(raw.objects), sample)
