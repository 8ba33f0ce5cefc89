"""How many samples and micro-steps training took: `train/samples_*`, `train/micro_steps`, `accum/*`.

In a mixture also how many samples of each data set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from coordexp.metrics.accumulate import MetricStore
from coordexp.metrics.catalog import EVAL_PREFIX
from coordexp.metrics.keys_datasets import (
    DATASET_SAMPLES_SEEN,
    DATASET_SAMPLES_TOTAL,
    DATASET_SHARE,
    dataset_key,
)
from coordexp.metrics.keys_stage1 import (
    ACCUM_CURRENT_GRAD_STEPS,
    ACCUM_GRAD_STEPS,
    TRAIN_MICRO_STEPS,
    TRAIN_SAMPLES_SEEN,
    TRAIN_SAMPLES_TOTAL,
)

PROGRESS_KEY = "CoordExpProgress"
"""Where the count lives in trainer_state.json: beside the states of callbacks, which ms-swift saves and loads."""


class Progress:
    """Counts of this rank since the last flush, and of all ranks up to it.

    Args:
        metrics: where the counts of a log window are gathered.
        grad_steps: configured gradient_accumulation_steps.
        datasets: names of the data sets of a mixture, the same on all ranks.
    """

    def __init__(self, metrics: MetricStore, grad_steps: int, datasets: Sequence[str] = ()) -> None:
        self._metrics, self._grad_steps = metrics, grad_steps
        self._current: int | None = None
        self._seen = 0.0  # samples of all ranks up to the last flush
        self._pending = 0  # samples of this rank since then
        self._seen_of = dict.fromkeys(datasets, 0.0)  # the same for each data set
        self._pending_of = dict.fromkeys(datasets, 0)

    def add_step(self, num_micro_steps: int) -> None:
        """One optimizer step of so many micro-steps is about to run."""
        self._current = num_micro_steps
        self._metrics.add(TRAIN_MICRO_STEPS, num_micro_steps)
        for key, value in self._accumulation(num_micro_steps).items():
            self._metrics.add(key, value)

    def add_samples(self, num_samples: int, datasets: Iterable[str] = ()) -> None:
        """So many original samples of this rank are trained on in the coming step.

        datasets: the data set of each, in a mixture.
        """
        self._pending += num_samples
        self._metrics.add(TRAIN_SAMPLES_TOTAL, num_samples)
        for name, number in Counter(datasets).items():
            if name in self._pending_of:
                self._pending_of[name] += number
                self._metrics.add(dataset_key(name, DATASET_SAMPLES_TOTAL), number)

    def finish(self, flushed: dict[str, float], mode: str) -> dict[str, float]:
        """A flushed window (the same on all ranks) with what follows from it."""
        if mode == "eval" and self._current is not None:
            accumulation = self._accumulation(self._current)
            flushed |= {EVAL_PREFIX + key: float(value) for key, value in accumulation.items()}
        if mode == "train" and TRAIN_SAMPLES_TOTAL in flushed:
            self._seen += flushed[TRAIN_SAMPLES_TOTAL]
            self._pending = 0
            flushed[TRAIN_SAMPLES_SEEN] = self._seen
            flushed |= self._finish_datasets(flushed)
        return flushed

    def _finish_datasets(self, flushed: dict[str, float]) -> dict[str, float]:
        for name in self._seen_of:
            self._seen_of[name] += flushed.get(dataset_key(name, DATASET_SAMPLES_TOTAL), 0.0)
            self._pending_of[name] = 0
        total = sum(self._seen_of.values())
        numbers = {}
        for name, seen in self._seen_of.items():
            numbers[dataset_key(name, DATASET_SAMPLES_SEEN)] = seen
            numbers[dataset_key(name, DATASET_SHARE)] = seen / total if total else 0.0
        return numbers

    def state(self, sum_over_ranks: Callable[[int], int]) -> dict[str, Any]:
        """What a checkpoint keeps. Collective: all ranks call it."""
        seen = {"samples_seen": self._seen + sum_over_ranks(self._pending)}
        of_datasets = {
            name: seen_of + sum_over_ranks(self._pending_of[name]) for name, seen_of in self._seen_of.items()
        }
        return {"args": {}, "attributes": {**seen, **({"of_datasets": of_datasets} if of_datasets else {})}}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from the state of a checkpoint (None: from none)."""
        if state is not None:
            self._seen = float(state["attributes"]["samples_seen"])
            of_datasets = state["attributes"].get("of_datasets", {})
            self._seen_of |= {name: float(of_datasets[name]) for name in self._seen_of if name in of_datasets}

    def _accumulation(self, num_micro_steps: int) -> dict[str, int]:
        return {ACCUM_GRAD_STEPS: self._grad_steps, ACCUM_CURRENT_GRAD_STEPS: num_micro_steps}
