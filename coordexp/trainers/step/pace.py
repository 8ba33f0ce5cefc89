"""How far a run has come, how fast, and on how much memory: the counts, clocks and schedule behind `PACE` keys."""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping, Sequence
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
    TIME_SHARES,
    TIME_STEP,
    TRAIN_TOKENS_TOTAL,
)
from coordexp.metrics.keys_stage1 import LATENT_TEXT_STEPS
from coordexp.metrics.progress import Progress
from coordexp.telemetry.console.words import prompted
from coordexp.trainers.step.plan import StepLoad
from coordexp.trainers.step.timer import StepTimer

OWN_PHASES = ("data", "generation", "forward")
"""Parts of a step in which a rank does not wait for others (but for weights, under ZeRO-3)."""
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
        self.busy_s: float | None = None
        """Seconds of a step of the last window in which this rank did not wait for others."""

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
            steps = self.timer.entries()
            for entries in steps:
                self._metrics.add_all(entries)
            self.busy_s = busy_seconds(steps)
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


def busy_seconds(steps: Sequence[Mapping[str, tuple[float, float]]]) -> float | None:
    """Mean seconds of a step in the parts that wait for no other rank; None without a step."""
    timed = [step for step in steps if TIME_STEP in step]
    if not timed:
        return None
    return sum(step[TIME_SHARES[phase]][0] for step in timed for phase in OWN_PHASES) / len(timed)


class StepEnd(TrainerCallback):
    """Tells a timer where steps end."""

    def __init__(self, timer: StepTimer) -> None:
        self._timer = timer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._timer.finish()


def tags_of(numbers: dict[str, float]) -> dict[str, str]:
    """In words what a record says in numbers: key -> word."""
    words = {PACKING_MODE: PACKING_MODES, LR_PHASE: LR_PHASES}
    tags = {key: names[int(numbers[key])] for key, names in words.items() if key in numbers}
    if LATENT_TEXT_STEPS in numbers:
        tags[LATENT_TEXT_STEPS] = prompted(numbers[LATENT_TEXT_STEPS])
    return tags


def peak_memory_gb(device: torch.device) -> float:
    """Most memory in use so far, in 1e9 bytes: of the accelerator's allocator; on a CPU the resident set."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
    return float(torch.get_device_module(device).max_memory_allocated(device)) / 1e9
