"""What stats.json says after every optimizer step: how far the run is, its loss, its speed, when it ends."""

from __future__ import annotations

import math
from collections.abc import Mapping

from coordexp.metrics.keys_run import LOSS, TIME_STEP
from coordexp.metrics.payload import Payload, build_payload


class StepStats:
    """Of one attempt of a run.

    first_step: optimizer steps that lie before it.  started: seconds on some clock.
    """

    def __init__(self, first_step: int, max_steps: int, started: float) -> None:
        self._first_step, self._max_steps = first_step, max_steps
        self._started = self._before = started

    def after(self, step: int, now: float, loss: float | None, recorded: Mapping[str, int]) -> Payload:
        """A payload, right after optimizer step `step` has ended.

        now: on the clock of `started`.  loss: of that step, over all ranks; left out where it is None or not finite.
        recorded: mode -> step of its newest record in metrics.jsonl.

        `progress` beside its metrics: `max_steps`, `elapsed_s` of this attempt, and `eta_s`, what is left at the mean
        pace of the attempt, evaluations and saves included.
        """
        numbers = {TIME_STEP: now - self._before}
        if loss is not None and math.isfinite(loss):
            numbers[LOSS] = loss
        self._before = now
        elapsed, done = now - self._started, step - self._first_step
        left = max(0, self._max_steps - step)
        progress = {
            "max_steps": self._max_steps,
            "elapsed_s": round(elapsed, 3),
            "eta_s": round(elapsed / done * left, 3) if done else None,
        }
        return build_payload("train", step, numbers, progress=progress, recorded=dict(recorded))
