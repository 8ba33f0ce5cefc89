"""How far a run has come, how fast, and on how much memory: the counts, clocks and schedule behind `PACE` keys."""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from coordexp.control.lr_schedule import LR_PHASES, LrSchedule
from coordexp.metrics.accumulate import MetricStore
from coordexp.metrics.keys_run import (
    LR_PHASE,
    MEMORY_PEAK,
    PACKING_MODE,
    PACKING_UTILIZATION,
    TRAIN_TOKENS_TOTAL,
)
from coordexp.metrics.progress import Progress
from coordexp.trainers.step.plan import StepLoad
from coordexp.trainers.step.timer import StepTimer

PACKING_MODES = ("padded", "packed")
"""In the order of the values of `packing/mode`."""


class Pace:
    """Of one rank.

    metrics: where the entries of a log window are gathered.  grad_steps: configured gradient_accumulation_steps.
    datasets: names of the data sets of a mixture, the same on all ranks.
    """

    def __init__(
        self, metrics: MetricStore, grad_steps: int, device: torch.device, datasets: Sequence[str] = ()
    ) -> None:
        self._metrics, self._device = metrics, device
        self._progress = Progress(metrics, grad_steps, datasets)
        self.timer = StepTimer(device)
        self.schedule = LrSchedule()
        """Of the run, once its length is known."""

    def add_step(self, num_micro_steps: int) -> None:
        """One optimizer step of so many micro-steps is about to be planned."""
        self._progress.add_step(num_micro_steps)

    def add_samples(self, num_samples: int, datasets: Sequence[str] = ()) -> None:
        """Original samples of this rank in the step that is being planned; in a mixture the data set of each."""
        self._progress.add_samples(num_samples, datasets)

    def add_load(self, load: StepLoad) -> None:
        """What this rank trains on in the step that is about to run."""
        self._progress.add_load(num_tokens=load.num_supervised, num_images=load.num_images)
        self._metrics.add(PACKING_MODE, float(load.is_packed))
        if load.num_places:
            self._metrics.add(PACKING_UTILIZATION, load.num_tokens, load.num_places)

    def window(self, mode: str, step: int) -> dict[str, float]:
        """The metrics gathered since the last call for `mode`, reduced over ranks. Collective."""
        if mode == "train":
            for entries in self.timer.entries():
                self._metrics.add_all(entries)
            self._metrics.add(MEMORY_PEAK, peak_memory_gb(self._device))
        window = self._progress.finish(self._metrics.flush(mode), mode)
        if mode == "train" and TRAIN_TOKENS_TOTAL in window:
            window[LR_PHASE] = float(LR_PHASES.index(self.schedule.phase(step)))
        return window

    def state(self, sum_over_ranks: Callable[[Sequence[int]], Sequence[int]]) -> dict[str, Any]:
        """What a checkpoint keeps. Collective."""
        return self._progress.state(sum_over_ranks)

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from the state of a checkpoint (None: from none)."""
        self._progress.restore(state)


class StepEnd(TrainerCallback):
    """Tells a timer where steps end."""

    def __init__(self, timer: StepTimer) -> None:
        self._timer = timer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._timer.finish()


def tags_of(numbers: dict[str, float]) -> dict[str, str]:
    """In words what a record says in numbers: key -> word."""
    words = {PACKING_MODE: PACKING_MODES, LR_PHASE: LR_PHASES}
    return {key: names[int(numbers[key])] for key, names in words.items() if key in numbers}


def peak_memory_gb(device: torch.device) -> float:
    """Most memory in use so far, in 1e9 bytes: of the accelerator's allocator; on a CPU the resident set."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
    return float(torch.get_device_module(device).max_memory_allocated(device)) / 1e9
