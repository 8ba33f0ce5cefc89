"""The part of bench_metrics.py inside `swift sft`: `--callbacks measure_metrics` measures instead of training.

BENCH_RESULT names the file for the wall and CPU seconds per step of every round, BENCH_ROUNDS how many rounds.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from swift.callbacks import callbacks_map
from torch import Tensor
from transformers import TrainerCallback

from coordexp.data.batch_meta import BatchMeta
from coordexp.data.collator import with_meta
from coordexp.losses import coord as atoms
from coordexp.losses.inputs import LossInputs
from coordexp.losses.sums import divide
from coordexp.swift_bridge.trainer import SUPERVISION_KEYS
from coordexp.trainers.step.planners import COORD, TEXT

STEPS = 10
KINDS = ("none", "all", "watched")


class LossAlone:
    """What stage 1 must compute for its gradient, and no more; stands in for the trainer's `compute_loss`."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.weights = trainer, trainer.weights
        self.needs = trainer.weights.needs()

    def __call__(self, model: torch.nn.Module, inputs: dict[str, Any], **_options: Any) -> Tensor:
        rows = BatchMeta.take(inputs).rows
        for key in SUPERVISION_KEYS:
            inputs.pop(key, None)
        loss, _ = self.trainer.head(
            model, self.trainer.unwrapped_model, inputs, rows, self.needs, self._objective, None
        )
        self.trainer.stop_if_not_finite({"loss": loss}, loss=loss)
        return loss

    def _objective(self, inputs: LossInputs) -> tuple[Tensor, None]:
        totals = self.trainer._plan.totals
        weights, dist, bins_N = self.weights, inputs.distribution, inputs.rows.bins_N
        target_NK = atoms.gaussian_targets(
            bins_N,
            dist.num_bins,
            weights.target_sigma,
            weights.target_truncate,
            dtype=dist.log_probs_NK.dtype,
        )
        coord_N = weights.soft_ce_weight * atoms.soft_ce_rows(dist, target_NK)
        coord_N = coord_N + weights.w1_weight * atoms.w1_rows(dist, target_NK)
        coord_N = coord_N + weights.ce_weight * atoms.token_ce_rows(dist, bins_N)
        if inputs.coord_log_odds_N is not None:
            coord_N = coord_N + weights.gate_weight * atoms.gate_rows(inputs.coord_log_odds_N)
        return divide(inputs.text_ce_R.sum(), totals[TEXT]) + divide(coord_N.sum(), totals[COORD]), None


class Unwatched:
    """Stands in for what a trainer tells its records to."""

    def show(self, *_arguments: Any) -> None:
        """No console."""

    def look(self, *_arguments: Any) -> None:
        """No rules."""

    def was_busy(self, *_arguments: Any) -> None:
        """No signs of life."""

    def note(self, *_arguments: Any) -> None:
        """No stats."""


class Bench:
    """Runs steps of a trainer without its metrics, with them, and with what watches them."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.model = trainer, trainer.model_wrapped
        self.rounds = 0
        self.watching = (trainer._console, trainer._watch, trainer._stats)
        every = (trainer.data_collator, trainer.compute_loss)
        self.ways = {
            "all": every,
            "watched": every,
            "none": (
                with_meta(trainer.template.data_collator, trainer.columns),
                LossAlone(trainer),
            ),
        }
        batch_size = trainer.args.per_device_train_batch_size
        samples = [trainer.train_dataset[index] for index in range(len(trainer.train_dataset))]
        self.batches = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]

    def round(self) -> dict[str, tuple[float, float]]:
        """Wall and CPU seconds per step of each kind, over STEPS steps. All kinds take every batch."""
        spent = {kind: [0.0, 0.0] for kind in KINDS}

        def timed(kind: str, call: Callable[[], None]) -> None:
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            spent[kind][0] += (time.perf_counter() - wall) / STEPS
            spent[kind][1] += (time.process_time() - cpu) / STEPS

        for index in range(STEPS):
            samples = self.batches[index % len(self.batches)]
            turn = (index + self.rounds) % len(KINDS)
            for kind in (*KINDS[turn:], *KINDS[:turn]):
                timed(kind, partial(self._step, kind, samples))
                if kind != "none" and index == STEPS - 1:
                    timed(kind, partial(self._record, kind))
        self.rounds += 1
        return {kind: (wall, cpu) for kind, (wall, cpu) in spent.items()}

    def _record(self, kind: str) -> None:
        trainer = self.trainer
        trainer.state.global_step += 50  # lines of all levels are due
        unwatched = (Unwatched(),) * len(self.watching)
        trainer._console, trainer._watch, trainer._stats = self.watching if kind == "watched" else unwatched
        trainer.log({"loss": 1.0, "learning_rate": 1e-4})
        trainer._console, trainer._watch, trainer._stats = self.watching

    def _step(self, kind: str, samples: list[dict[str, Any]]) -> None:
        trainer = self.trainer
        collate, trainer.compute_loss = self.ways[kind]
        if kind != "none":
            trainer.pace.timer.start("data")
        batch = collate([dict(sample) for sample in samples])
        if kind != "none":
            trainer.on_step(1)
        trainer.plan_step([batch])
        trainer.training_step(
            self.model, batch, num_items_in_batch=1
        )  # the loss divides by counts of its own
        trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        self.model.zero_grad()
        trainer.pace.timer.finish()
        if kind == "watched":
            trainer._stats.on_step_end(trainer.args, trainer.state, trainer.control)


class MeasureMetrics(TrainerCallback):
    def __init__(self, args: Any, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
        """At the first step: trackers and console are open by then."""
        self.trainer.pace.timer.cancel()
        self.trainer.model.train()
        bench = Bench(self.trainer)
        bench.round()
        seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
        for _ in range(int(os.environ["BENCH_ROUNDS"])):
            for kind, pair in bench.round().items():
                seconds[kind].append(pair)
        Path(os.environ["BENCH_RESULT"]).write_text(json.dumps(seconds))
        raise SystemExit(0)


callbacks_map["measure_metrics"] = MeasureMetrics
