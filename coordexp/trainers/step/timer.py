"""What the seconds of an optimizer step go to, without waiting for the device.

    timer.start("data")                          # a step begins
    with timer.phase("forward"): ...             # inner phases interrupt outer ones
    timer.switch("other")
    timer.finish()                               # it ends
    for step in timer.take(): step["forward"]    # when a record is written

Borders are stamps: on CUDA events on the current stream, which are read in `take`; elsewhere the host's clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from statistics import median

import torch

from coordexp.metrics.keys_run import PHASES, TIME_FIRST_STEP, TIME_SHARES, TIME_STEP

Stamp = float | torch.cuda.Event
NUM_AFTER_FIRST = 10
"""Steps that the first one is compared with."""


class StepTimer:
    """Seconds by phase of every step; calls outside a step do nothing.

    device: what the steps run on.  clock: seconds of the host.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._uses_events = device.type == "cuda"
        self._borders: list[tuple[str, Stamp]] | None = None
        """Phases of the running step, each with its begin."""
        self._finished: list[tuple[list[tuple[str, Stamp]], Stamp]] = []
        self._early: list[float] | None = []  # seconds of the first steps; None once they are compared

    def start(self, phase: str) -> None:
        """A step begins, with `phase`."""
        self._borders = [(phase, self._stamp())]

    def cancel(self) -> None:
        """There is no step after all."""
        self._borders = None

    def switch(self, phase: str) -> None:
        """From now on `phase`."""
        if self._borders is not None:
            self._borders.append((phase, self._stamp()))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """`name` inside the block, then again what was before."""
        before = None if self._borders is None else self._borders[-1][0]
        self.switch(name)
        try:
            yield
        finally:
            if before is not None:
                self.switch(before)

    def finish(self) -> None:
        """The step ends."""
        if self._borders is not None:
            self._finished.append((self._borders, self._stamp()))
            self._borders = None

    def take(self) -> list[dict[str, float]]:
        """Seconds by phase of each step that has ended since the last call. On CUDA the host waits for the last one."""
        finished, self._finished = self._finished, []
        if finished:
            end = finished[-1][1]
            if not isinstance(end, float):
                end.synchronize()
        return [_seconds_by_phase(borders, end) for borders, end in finished]

    def entries(self) -> list[Mapping[str, tuple[float, float]]]:
        """(sum, count) entries for the metric store, one mapping for each step that has ended since the last call."""
        found: list[Mapping[str, tuple[float, float]]] = []
        for step in self.take():
            total = sum(step.values())
            if total > 0:
                shares = {TIME_SHARES[phase]: (step[phase], total) for phase in PHASES}
                found.append({TIME_STEP: (total, 1.0), **shares})
            if (beyond := self._first_beyond(total)) is not None:
                found.append({TIME_FIRST_STEP: (beyond, 1.0)})
        return found

    def _first_beyond(self, seconds: float) -> float | None:
        """Once, at the last of the early steps: by how much the first took longer than the median of the others."""
        if self._early is None:
            return None
        self._early.append(seconds)
        if len(self._early) <= NUM_AFTER_FIRST:
            return None
        first, *others = self._early
        self._early = None
        return max(0.0, first - median(others))

    def _stamp(self) -> Stamp:
        if not self._uses_events:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds_by_phase(borders: list[tuple[str, Stamp]], end: Stamp) -> dict[str, float]:
    seconds = dict.fromkeys(PHASES, 0.0)
    for (phase, begin), (_, stop) in pairwise([*borders, ("", end)]):
        seconds[phase] += _between(begin, stop)
    return seconds


def _between(begin: Stamp, end: Stamp) -> float:
    """Seconds from one stamp to another of the same kind."""
    if isinstance(begin, float):
        assert isinstance(end, float)
        return end - begin
    assert not isinstance(end, float)
    return float(begin.elapsed_time(end)) / 1000.0
