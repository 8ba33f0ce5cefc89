"""Rollouts by transformers' generate, with a model of this process: the one in training, or a loaded checkpoint."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.forms.choose import form_of
from coordexp.codec.pieces import pieces_of
from coordexp.config.schema.rollout import RolloutMatching
from coordexp.control.halving import Halving, OnRetry
from coordexp.rollout.backend import PolicyBackend
from coordexp.rollout.checks import batch_name, encoding, name_of
from coordexp.rollout.decoding.distributions import NotedDistributions
from coordexp.rollout.decoding.guided import Guide, GuidedAnswers, GuideRules, finish_reason
from coordexp.rollout.decoding.readout import CoordReadout
from coordexp.rollout.decoding.repetition import RepeatTermination, was_terminated
from coordexp.rollout.decoding.sampling import Deadline, RepetitionPenalty, TokenLogprobs, samplers
from coordexp.rollout.time_limit import TimeLimit, generate_limit
from coordexp.rollout.types import Rollout, RolloutRequest
from coordexp.rollout.weights.policy_model import borrowed_for_generation
from coordexp.swift_bridge.generation_prompts import (
    collate_questions,
    encode_question,
    questions_template,
    stop_token_ids,
    without_training_hooks,
)

Around = Callable[[Sequence[RolloutRequest]], AbstractContextManager[None]]


class HfBackend(PolicyBackend):
    """Generates with the model itself, so what it serves is never stale.

    Each request samples from a random stream of its own, so that its answer depends neither on its neighbours nor on
    `decode_batch_size`; the random streams of training are not touched. Under ZeRO-3 all ranks call `generate`
    together. Without a time limit for the call, each batch has `generate_timeout_s`.

    Arguments:
        model: unwrapped, PEFT or not.
        template: of the training run, or of the checkpoint.
        form: of the answers, which guided decoding keeps to; None: CoordJSON.
        deepspeed_engine: the engine around the model, needed under ZeRO-3.
        offload: makes the context that generation runs in.
        on_retry: told when memory ran out and fewer questions are decoded at once from then on. Ranks need not agree on
            it: within the context of generation none computes with another.
        around: makes the context that `generate` runs in for some requests, one a row of its batch (beams aside).

    token_logprobs: give log-probabilities of the answers (not with beams); may be switched between calls.
    coord_distributions: give the distributions of their coordinates (not with beams).
    """

    name = "hf"

    def __init__(
        self,
        settings: RolloutMatching,
        model: Any,
        template: Any,
        *,
        form: AnswerForm | None = None,
        deepspeed_engine: Any = None,
        offload: Callable[[], AbstractContextManager[None]] = nullcontext,
        token_logprobs: bool = False,
        coord_distributions: bool = False,
        on_retry: OnRetry = lambda: None,
        around: Around = lambda _requests: nullcontext(),
    ) -> None:
        super().__init__()
        self._around = around
        self._halving = Halving(
            "decoding by the hf backend, several questions at once",
            f"{settings.where}.decode_batch_size or max_new_tokens",
            error=torch.OutOfMemoryError,
            free=torch.cuda.empty_cache,
            on_retry=on_retry,
        )
        self.settings = settings
        self.token_logprobs = token_logprobs
        self.coord_distributions = coord_distributions
        self._model = model
        self._template = template
        self._form = form or form_of()
        self._deepspeed_engine = deepspeed_engine
        self._offload = offload
        self._stop_ids = stop_token_ids(template, model.generation_config.eos_token_id)
        self._pieces = pieces_of(template.tokenizer)
        self._spare_seeds = itertools.count()

    @property
    def model(self) -> Any:
        """What answers; None once closed."""
        return self._model

    @property
    def template(self) -> Any:
        """What encodes the questions."""
        return self._template

    @property
    def max_new_tokens(self) -> int:
        return self.settings.max_new_tokens

    @property
    def end_id(self) -> int:
        """The id of `<|im_end|>`."""
        end_id = self._pieces.im_end_id
        assert end_id is not None
        return end_id

    def _push(self, version: int) -> None:
        self.policy_version = version

    def _release(self) -> None:
        self._model = None

    def _answers(
        self, requests: Sequence[RolloutRequest], max_new_tokens: int, time_limit: TimeLimit | None
    ) -> list[Rollout]:
        size = self.settings.decode_batch_size
        rollouts: list[Rollout] = []
        with (
            self._offload(),
            without_training_hooks(self._template),
            borrowed_for_generation(self._model, self._deepspeed_engine),
        ):
            for start in range(0, len(requests), size):
                batch = [self._seeded(request) for request in requests[start : start + size]]
                answer = partial(self._in_pieces, batch, start, max_new_tokens, time_limit)
                rollouts += self._halving.run(len(batch), answer)
        return rollouts

    def _seeded(self, request: RolloutRequest) -> RolloutRequest:
        return request if request.seed is not None else replace(request, seed=next(self._spare_seeds))

    def _in_pieces(
        self,
        requests: Sequence[RolloutRequest],
        first_index: int,
        max_new_tokens: int,
        time_limit: TimeLimit | None,
        size: int,
    ) -> list[Rollout]:
        """Answers to a batch, `size` requests at once."""
        rollouts: list[Rollout] = []
        for start in range(0, len(requests), size):
            piece = requests[start : start + size]
            rollouts += self._answer(piece, first_index + start, max_new_tokens, time_limit)
        return rollouts

    def _answer(
        self,
        requests: Sequence[RolloutRequest],
        first_index: int,
        max_new_tokens: int,
        time_limit: TimeLimit | None,
    ) -> list[Rollout]:
        """Of one piece of a batch."""
        time_limit = time_limit or generate_limit(self.settings)
        started = time.perf_counter()
        questions = questions_template(self._template, self._model)
        encoded = []
        for index, request in enumerate(requests, first_index):
            with encoding(self.name, name_of(request, index)):
                encoded.append(encode_question(questions, request.messages, request.images))
        batch = collate_questions(questions, encoded, self._model.device)
        prompt_length = batch["input_ids"].shape[1]
        no_beams = self.settings.num_beams == 1
        logprobs = TokenLogprobs() if self.token_logprobs and no_beams else None
        noted = self._noted_distributions() if self.coord_distributions and no_beams else None
        rules = GuideRules.of(self.settings, self._form, limit=max_new_tokens)
        with self._around(requests):
            output = self._model.generate(
                **batch,
                generation_config=self._generation_config(max_new_tokens),
                logits_processor=self._processors(
                    requests, batch, rules, [one for one in (logprobs, noted) if one is not None]
                ),
                stopping_criteria=StoppingCriteriaList(
                    [Deadline(time_limit, self.name, batch_name(requests))]
                ),
                synced_gpus=False,
            )
        answers = [self._cut(ids) for ids in output.sequences[:, prompt_length:].tolist()]
        logprobs_BT = logprobs.finish(output.sequences).tolist() if logprobs else [[] for _ in answers]
        distributions = noted.finish(answers) if noted else [()] * len(answers)
        seconds = (time.perf_counter() - started) / len(requests)
        return [
            Rollout(
                prompt_token_ids=tuple(entry["input_ids"]),
                response_token_ids=tuple(answer),
                token_logprobs=tuple(logprobs_T[: len(answer)]),
                finish_reason=finish_reason(answer, self._stop_ids, rules),
                seconds=seconds,
                policy_version=self.policy_version,
                repeat_terminated=self._was_terminated(answer),
                coord_distributions=found,
            )
            for entry, answer, logprobs_T, found in zip(
                encoded, answers, logprobs_BT, distributions, strict=True
            )
        ]

    def _generation_config(self, max_new_tokens: int) -> GenerationConfig:
        """Greedy or beams; everything else that the model's own defaults could bring is neutral."""
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=self.settings.num_beams,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=list(self._stop_ids),
            pad_token_id=self._template.tokenizer.pad_token_id,
            use_cache=True,
            return_dict_in_generate=True,
        )

    def _processors(
        self,
        requests: Sequence[RolloutRequest],
        batch: dict[str, Tensor],
        rules: GuideRules | None,
        watching: Sequence[LogitsProcessor],
    ) -> LogitsProcessorList:
        settings, device = self.settings, batch["input_ids"].device
        processors = LogitsProcessorList(watching)
        prompt_length = batch["input_ids"].shape[1]
        if rules is not None:
            guide = Guide.of(self._template.tokenizer, rules)
            processors.append(
                GuidedAnswers(guide, rules, num_rows=len(requests), prompt_length=prompt_length)
            )
        elif settings.decoding.coord != "argmax":
            processors.append(CoordReadout(settings.decoding.coord, self._coord_vocab.ids))
        if settings.repetition_penalty != 1.0:
            processors.append(RepetitionPenalty(settings.repetition_penalty, batch["attention_mask"]))
        if settings.repeat_terminate.enabled and rules is None:
            processors.append(
                RepeatTermination(
                    settings.repeat_terminate,
                    num_rows=len(requests),
                    prompt_length=prompt_length,
                    end_id=self.end_id,
                    stop_ids=self._stop_ids,
                    piece_of=self._pieces.__getitem__,
                )
            )
        seeds = [request.seed for request in requests if request.seed is not None]
        return LogitsProcessorList([*processors, *samplers(settings.decoding, seeds, device)])

    def _noted_distributions(self) -> NotedDistributions:
        return NotedDistributions(self._coord_vocab.ids, self._model.device)

    @cached_property
    def _coord_vocab(self) -> CoordVocab:
        return CoordVocab.from_tokenizer(self._template.tokenizer)

    def _cut(self, ids: list[int]) -> list[int]:
        """The row of an answer up to the token that ended it; padding follows."""
        end = next((index for index, token_id in enumerate(ids) if token_id in self._stop_ids), len(ids) - 1)
        return ids[: end + 1]

    def _was_terminated(self, answer: Sequence[int]) -> bool:
        rules = self.settings.repeat_terminate
        return was_terminated(
            answer,
            self.end_id,
            rules if rules.enabled else None,
            self._pieces.__getitem__,
            guided=self.settings.decoding.guided,
        )
