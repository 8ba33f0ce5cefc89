"""How much training took: `train/{samples,tokens,images}_*`, `train/micro_steps`, `accum/*`.

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
from coordexp.metrics.keys_run import (
    TIME_STEP,
    TRAIN_IMAGES_SEEN,
    TRAIN_IMAGES_TOTAL,
    TRAIN_TOKENS_PER_S,
    TRAIN_TOKENS_SEEN,
    TRAIN_TOKENS_TOTAL,
)
from coordexp.metrics.keys_stage1 import (
    ACCUM_CURRENT_GRAD_STEPS,
    ACCUM_GRAD_STEPS,
    TRAIN_MICRO_STEPS,
    TRAIN_SAMPLES_SEEN,
    TRAIN_SAMPLES_TOTAL,
)

PROGRESS_KEY = "CoordExpProgress"
"""Where the counts live in trainer_state.json: beside the states of callbacks, which ms-swift saves and loads."""

_COUNTED = {
    "samples_seen": (TRAIN_SAMPLES_TOTAL, TRAIN_SAMPLES_SEEN),
    "tokens_seen": (TRAIN_TOKENS_TOTAL, TRAIN_TOKENS_SEEN),
    "images_seen": (TRAIN_IMAGES_TOTAL, TRAIN_IMAGES_SEEN),
}
"""Name in a checkpoint -> key of the count of a window, and of the running total."""


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
        self._num_steps = 0  # since the last flush
        self._seen = dict.fromkeys(_COUNTED, 0.0)  # of all ranks up to the last flush
        self._pending = dict.fromkeys(_COUNTED, 0)  # of this rank since then
        self._seen_of = dict.fromkeys(datasets, 0.0)  # samples of each data set, likewise
        self._pending_of = dict.fromkeys(datasets, 0)

    def add_step(self, num_micro_steps: int) -> None:
        """One optimizer step of so many micro-steps is about to run."""
        self._current = num_micro_steps
        self._num_steps += 1
        self._metrics.add(TRAIN_MICRO_STEPS, num_micro_steps)
        for key, value in self._accumulation(num_micro_steps).items():
            self._metrics.add(key, value)

    def add_samples(self, num_samples: int, datasets: Iterable[str] = ()) -> None:
        """So many original samples of this rank are trained on in the coming step.

        datasets: the data set of each, in a mixture.
        """
        self._add("samples_seen", num_samples)
        for name, number in Counter(datasets).items():
            if name in self._pending_of:
                self._pending_of[name] += number
                self._metrics.add(dataset_key(name, DATASET_SAMPLES_TOTAL), number)

    def add_load(self, *, num_tokens: int, num_images: int) -> None:
        """So many supervised tokens and pictures of this rank are trained on in the coming step."""
        self._add("tokens_seen", num_tokens)
        self._add("images_seen", num_images)

    def finish(self, flushed: dict[str, float], mode: str) -> dict[str, float]:
        """A flushed window (the same on all ranks) with what follows from it."""
        if mode == "eval" and self._current is not None:
            accumulation = self._accumulation(self._current)
            flushed |= {EVAL_PREFIX + key: float(value) for key, value in accumulation.items()}
        if mode == "train":
            for name, (of_window, running) in _COUNTED.items():
                if of_window in flushed:
                    self._seen[name] += flushed[of_window]
                    self._pending[name] = 0
                    flushed[running] = self._seen[name]
            if TRAIN_SAMPLES_TOTAL in flushed:
                flushed |= self._finish_datasets(flushed)
            if TRAIN_TOKENS_TOTAL in flushed and flushed.get(TIME_STEP):
                seconds = flushed[TIME_STEP] * self._num_steps
                flushed[TRAIN_TOKENS_PER_S] = flushed[TRAIN_TOKENS_TOTAL] / seconds
            self._num_steps = 0
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

    def state(self, sum_over_ranks: Callable[[Sequence[int]], Sequence[int]]) -> dict[str, Any]:
        """What a checkpoint keeps. Collective: all ranks call it."""
        pending = list(sum_over_ranks([*self._pending.values(), *self._pending_of.values()]))
        seen = {name: self._seen[name] + number for name, number in zip(_COUNTED, pending, strict=False)}
        of_datasets = {
            name: self._seen_of[name] + number
            for name, number in zip(self._seen_of, pending[len(_COUNTED) :], strict=True)
        }
        return {"args": {}, "attributes": {**seen, **({"of_datasets": of_datasets} if of_datasets else {})}}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from the state of a checkpoint (None: from none). What it does not count starts at 0."""
        if state is not None:
            self._seen = {name: float(state["attributes"].get(name, 0.0)) for name in _COUNTED}
            of_datasets = state["attributes"].get("of_datasets", {})
            self._seen_of |= {name: float(of_datasets[name]) for name in self._seen_of if name in of_datasets}

    def _add(self, name: str, number: int) -> None:
        self._pending[name] += number
        self._metrics.add(_COUNTED[name][0], number)

    def _accumulation(self, num_micro_steps: int) -> dict[str, int]:
        return {ACCUM_GRAD_STEPS: self._grad_steps, ACCUM_CURRENT_GRAD_STEPS: num_micro_steps}
