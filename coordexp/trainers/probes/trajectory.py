"""`telemetry.trajectory_probe`: the trajectory of hidden states on a few fixed samples, free and nudged.

free      the model's own greedy answer, read back in one forward
nudged    the ground truth, each token predicted from the true ones before it

Both are measured in one metric, whose variance runs over the rows of the window: all samples, both phases. Nothing is
remembered from window to window, so the numbers depend on the model alone. All ranks measure the same.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from coordexp.config.schema.rollout import RolloutMatching
from coordexp.config.schema.telemetry import TrajectoryProbeSettings
from coordexp.data.chosen import ChosenSamples
from coordexp.data.raw_samples import RawSample
from coordexp.head.call import head_computes
from coordexp.metrics import keys_run as keys
from coordexp.rollout.backends.hf import HfBackend
from coordexp.rollout.types import RolloutRequest
from coordexp.rollout.weights.policy_model import borrowed_for_generation
from coordexp.swift_bridge.generation_prompts import (
    collate_questions,
    encode_question,
    questions_template,
    with_answers,
    without_training_hooks,
)
from coordexp.targets.builder import TargetBuilder
from coordexp.telemetry.trajectory import RunningVariance, trajectory

ROWS_AT_ONCE = 128
"""Of the head's logits."""


class AnswerRead(NamedTuple):
    """An answer as the model reads it: rows at the head's input, and -log p of each of its tokens."""

    hidden_TH: Tensor
    nll_T: Tensor


class TrajectoryProbe(TrainerCallback):
    """Adds its numbers to the training record of every `every_steps`-th step.

    trainer: one of ours.
    """

    def __init__(self, trainer: Any, settings: TrajectoryProbeSettings, samples: ChosenSamples) -> None:
        self._trainer, self._settings = trainer, settings
        self._samples = [samples[index] for index in range(len(samples))]
        builder = TargetBuilder(trainer.template.tokenizer, form=trainer.form)
        targets = [
            builder.from_ground_truth(raw.prompt_ids, raw.objects, sample_id=raw.sample_id)
            for raw in self._samples
        ]
        self._nudged = [target.target_ids.tolist()[: settings.max_new_tokens] for target in targets]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every = self._settings.every_steps
        if every is not None and state.global_step % every == 0:
            self._trainer.metrics.add_all(self.measure(), mode="train")

    def measure(self) -> dict[str, float]:
        """The `trajectory/*` keys of the model as it is. Collective under ZeRO-3."""
        started = time.perf_counter()
        trainer, template = self._trainer, self._trainer.template
        model = trainer.unwrapped_model
        engine = trainer.model_wrapped if trainer.is_deepspeed_enabled else None
        answers = {"free": self._free(model, engine), "nudged": self._nudged}
        with without_training_hooks(template), borrowed_for_generation(model, engine):
            reads = {
                phase: [_read(model, template, *pair) for pair in zip(self._samples, ids, strict=True)]
                for phase, ids in answers.items()
            }
        numbers = window_numbers(reads, self._settings.eps)
        numbers[keys.TRAJECTORY_MS] = 1e3 * (time.perf_counter() - started)
        return numbers

    def _free(self, model: Any, engine: Any) -> list[Sequence[int]]:
        limit, number = self._settings.max_new_tokens, len(self._samples)
        settings = RolloutMatching(backend="hf", max_new_tokens=limit, decode_batch_size=number)
        backend = HfBackend(settings, model, self._trainer.template, deepspeed_engine=engine)
        requests = [RolloutRequest(raw.messages, raw.images, 0, raw.sample_id) for raw in self._samples]
        rollouts = backend.generate(requests)
        backend.close()
        return [rollout.response_token_ids for rollout in rollouts]


def _read(model: nn.Module, template: Any, raw: RawSample, answer: Sequence[int]) -> AnswerRead:
    """One forward over a question with an answer behind it."""
    questions = questions_template(template, model)
    batch = collate_questions(
        questions, [encode_question(questions, raw.messages, raw.images)], next(model.parameters()).device
    )
    first = batch["input_ids"].shape[1] - 1  # the row that writes the answer's first token
    ids_T = torch.tensor(answer, device=batch["input_ids"].device)
    batch = with_answers(batch, [answer], template.tokenizer.pad_token_id)
    found: list[AnswerRead] = []

    def look(head: nn.Module, hidden_BTH: Tensor) -> Tensor:
        hidden_TH = hidden_BTH[0, first : first + len(ids_T)]
        pieces = zip(hidden_TH.split(ROWS_AT_ONCE), ids_T.split(ROWS_AT_ONCE), strict=True)
        nll = [nn.functional.cross_entropy(head(rows).float(), ids, reduction="none") for rows, ids in pieces]
        found.append(AnswerRead(hidden_TH.float(), torch.cat(nll)))
        return hidden_BTH[:, :1]

    with head_computes(model, look):
        model(**batch, use_cache=False)
    return found[0]


def window_numbers(reads: Mapping[str, Sequence[AnswerRead]], eps: float) -> dict[str, float]:
    """Means over the tokens of a window, by phase, and free minus nudged; of short answers what there is."""
    every = [read.hidden_TH for phase in keys.ANSWER_PHASES for read in reads[phase]]
    variance = RunningVariance(every[0][0])
    for hidden_TH in every:
        variance.add(hidden_TH)
    metric_H = variance.metric_H(eps)
    means: dict[tuple[str, str], float] = {}
    for phase in keys.ANSWER_PHASES:
        found = [trajectory(one.hidden_TH, metric_H, eps) | {"nll": one.nll_T} for one in reads[phase]]
        for name in keys.TRAJECTORY_NUMBERS:
            values = torch.cat([one[name] for one in found])
            if len(values):
                means[phase, name] = float(values.mean())
    numbers = {keys.trajectory_key(*key): value for key, value in means.items()}
    for name in keys.TRAJECTORY_NUMBERS:
        if {("free", name), ("nudged", name)} <= means.keys():
            numbers[keys.trajectory_gap(name)] = means["free", name] - means["nudged", name]
    return numbers
