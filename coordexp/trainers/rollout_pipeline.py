"""From questions to training targets: generate, parse, match, build.

One pipeline serves both stage-2 trainers, in training and in evaluation. It holds no state of its own between steps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coordexp.codec.parse import ParsedRollout, parse_rollout
from coordexp.config.schema.rollout import Matching
from coordexp.data.raw_samples import RawSample
from coordexp.errors import RolloutError
from coordexp.matching import MatchResult, match_objects
from coordexp.rollout.types import PolicyBackend, Rollout, RolloutRequest
from coordexp.targets.builder import TargetBuilder
from coordexp.targets.sample import EncodedSample
from coordexp.trainers.channel_schedule import request_seed
from coordexp.trainers.rollout_metrics import RolloutOutcome
from coordexp.trainers.rollout_stream import RolloutStream


@dataclass(frozen=True)
class Answer:
    """What the model wrote for one sample, and what it is worth."""

    raw: RawSample
    rollout: Rollout
    parsed: ParsedRollout
    match: MatchResult


@dataclass(frozen=True)
class RolledOut:
    """The rollouts of a rank in one step, with the wall time of each part in seconds."""

    outcomes: tuple[RolloutOutcome, ...]
    answers: tuple[Answer, ...]
    generate_s: float
    parse_match_s: float
    encode_s: float

    @classmethod
    def joined(cls, parts: Sequence[RolledOut]) -> RolledOut:
        """Chunks of one step as one, in order; times are added up."""
        return cls(
            outcomes=tuple(outcome for part in parts for outcome in part.outcomes),
            answers=tuple(answer for part in parts for answer in part.answers),
            generate_s=sum(part.generate_s for part in parts),
            parse_match_s=sum(part.parse_match_s for part in parts),
            encode_s=sum(part.encode_s for part in parts),
        )

    @property
    def samples(self) -> list[EncodedSample]:
        """What is trained on; rollouts that gave no sample are left out."""
        return [outcome.sample for outcome in self.outcomes if isinstance(outcome.sample, EncodedSample)]


class RolloutPipeline:
    """Asks a backend, and makes targets of the answers.

    Arguments:
        matching: `rollout_matching.matching`.
        field_order: `custom.object_field_order`.
        allow_poly: False refuses predicted polygons (reason `poly_unsupported`).
    """

    def __init__(
        self,
        backend: PolicyBackend,
        builder: TargetBuilder,
        tokenizer: Any,
        matching: Matching,
        *,
        field_order: str = "desc_first",
        allow_poly: bool = True,
    ) -> None:
        self.backend = backend
        self._builder, self._tokenizer, self._matching = builder, tokenizer, matching
        self._field_order, self._allow_poly = field_order, allow_poly

    def run(
        self, samples: Sequence[RawSample], *, version: int, seed_base: int, first_index: int
    ) -> RolledOut:
        """Rollouts of `samples` by the policy `version`, and a training sample from each.

        seed_base: seed of the step.  first_index: index of the first of these requests among those of all ranks.
        """
        started = time.perf_counter()
        rollouts = self.generate(samples, version=version, seed_base=seed_base, first_index=first_index)
        return self.finish(samples, rollouts, generate_s=time.perf_counter() - started)

    def stream(
        self,
        samples: Sequence[RawSample],
        chunk_size: int,
        *,
        ahead: int,
        version: int,
        seed_base: int,
        first_index: int,
    ) -> RolloutStream[range, list[Rollout]]:
        """The same rollouts, `chunk_size` samples at a time, generated beside whatever the caller does meanwhile.

        It yields (indices of the samples, their rollouts, seconds), for `finish`. Other arguments as for `run`.
        """

        def generate(chunk: range) -> list[Rollout]:
            chosen = [samples[index] for index in chunk]
            return self.generate(
                chosen, version=version, seed_base=seed_base, first_index=first_index + chunk.start
            )

        indices = range(len(samples))
        chunks = [indices[start : start + chunk_size] for start in indices[::chunk_size]]
        return RolloutStream(generate, chunks, ahead=ahead)

    def finish(
        self, samples: Sequence[RawSample], rollouts: Sequence[Rollout], *, generate_s: float
    ) -> RolledOut:
        """Parse the rollouts of `samples`, match them, and make training samples."""
        generated = time.perf_counter()
        answers = [self.judge(raw, rollout) for raw, rollout in zip(samples, rollouts, strict=True)]
        judged = time.perf_counter()
        outcomes = [self._outcome(answer) for answer in answers]
        return RolledOut(
            outcomes=tuple(outcomes),
            answers=tuple(answers),
            generate_s=generate_s,
            parse_match_s=judged - generated,
            encode_s=time.perf_counter() - judged,
        )

    def generate(
        self, samples: Sequence[RawSample], *, version: int, seed_base: int, first_index: int
    ) -> list[Rollout]:
        """One rollout per sample, in order.

        Raises:
            RolloutError: the backend fails, or answers with other weights than those of `version`.
        """
        requests = [
            RolloutRequest(
                raw.messages, raw.images, request_seed(seed_base, first_index + index), raw.sample_id
            )
            for index, raw in enumerate(samples)
        ]
        rollouts = self.backend.generate(requests)
        for request, rollout in zip(requests, rollouts, strict=True):
            if rollout.policy_version != version:
                raise RolloutError(
                    f"{self.backend.name} backend: the answer to {request.request_id} comes from policy version "
                    f"{rollout.policy_version}, but the trained weights are version {version}. A weight push was lost; "
                    "check the log of the engine."
                )
        return rollouts

    def judge(self, raw: RawSample, rollout: Rollout, *, gate: float | None = None) -> Answer:
        """Parse an answer strictly and match it with the ground truth; `gate` in place of `maskiou_gate`."""
        parsed = parse_rollout(
            rollout.response_token_ids,
            self._tokenizer,
            field_order=self._field_order,
            allow_poly=self._allow_poly,
        )
        match = match_objects(
            parsed.objects,
            raw.objects,
            top_k=self._matching.candidate_top_k,
            gate=self._matching.maskiou_gate if gate is None else gate,
            resolution=self._matching.maskiou_resolution,
            fp_cost=self._matching.fp_cost,
            fn_cost=self._matching.fn_cost,
        )
        return Answer(raw, rollout, parsed, match)

    def _outcome(self, answer: Answer) -> RolloutOutcome:
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
