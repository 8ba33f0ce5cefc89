"""stats.json of a run, replaced at every optimizer step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from coordexp.metrics.payload import Payload
from coordexp.metrics.sinks import write_stats
from coordexp.telemetry.step_stats import StepStats


class StatsFile(TrainerCallback):
    """Written by the main process."""

    def __init__(self, run_dir: str | Path) -> None:
        self._run_dir = Path(run_dir)
        self.loss: float | None = None
        """Of the step that is running, once it is known."""
        self._stats: StepStats | None = None
        self._recorded: dict[str, int] = {}
        self._last: Payload | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stats = StepStats(state.global_step, state.max_steps, time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self._stats is not None:
            now = time.perf_counter()
            self._last = self._stats.after(state.global_step, now, self.loss, self._recorded)
            write_stats(self._run_dir, self._last)

    def note(self, mode: str, step: int) -> None:
        """A record of `mode` at `step` has been written."""
        self._recorded[mode] = step
        if self._last is not None:
            self._last["recorded"] = dict(self._recorded)
            write_stats(self._run_dir, self._last)
