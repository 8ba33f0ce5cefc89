"""Seconds of a step by part, on a clock that is set by hand."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch

from coordexp.metrics.accumulate import MetricStore
from coordexp.metrics.keys_run import PHASES
from coordexp.trainers.step.timer import StepTimer


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timer(clock: Clock) -> StepTimer:
    return StepTimer(torch.device("cpu"), clock)


def step(timer: StepTimer, clock: Clock, seconds: float) -> None:
    timer.start("data")
    clock.now += seconds
    timer.finish()


def test_inner_parts_are_taken_from_outer_ones(timer, clock):
    timer.start("data")
    clock.now += 1
    timer.switch("other")
    clock.now += 2
    with timer.phase("generation"):
        clock.now += 3
        with timer.phase("push"):
            clock.now += 4
        clock.now += 5
    clock.now += 6
    timer.switch("backward")
    clock.now += 7
    with timer.phase("forward"):
        clock.now += 8
    clock.now += 9
    timer.switch("optimizer")
    clock.now += 10
    timer.finish()
    clock.now += 1000  # an evaluation
    [found] = timer.take()
    assert found == {
        "data": 1, "other": 2 + 6, "generation": 3 + 5, "push": 4, "backward": 7 + 9, "forward": 8, "optimizer": 10,
    }  # fmt: skip
    assert timer.take() == []


def test_outside_a_step_nothing_is_counted(timer, clock):
    with timer.phase("forward"):  # of an evaluation
        clock.now += 1
    timer.switch("backward")
    timer.finish()
    timer.start("data")
    timer.cancel()  # the data loader had nothing left
    timer.finish()
    assert timer.take() == []


def test_a_part_that_raises_ends_too(timer, clock):
    timer.start("other")
    with suppress(ZeroDivisionError), timer.phase("forward"):
        clock.now += 1
        1 / 0  # noqa: B018
    clock.now += 2
    timer.finish()
    [found] = timer.take()
    assert (found["forward"], found["other"]) == (1, 2)


def test_shares_are_of_all_seconds_of_the_window_and_sum_to_one(timer, clock):
    for data, forward in ((1, 3), (2, 10)):
        timer.start("data")
        clock.now += data
        with timer.phase("forward"):
            clock.now += forward
        timer.finish()
    store = MetricStore(strict=True)
    for entries in timer.entries():
        store.add_all(entries)
    found = store.flush()
    assert found["time/step_s"] == 8
    assert (found["time/share_data"], found["time/share_forward"]) == (3 / 16, 13 / 16)
    assert sum(found[f"time/share_{phase}"] for phase in PHASES) == pytest.approx(1)


def test_the_first_step_is_compared_with_the_median_of_the_next_ten_once(timer, clock):
    seconds = [30.0, 4, 5, 6, 1, 2, 3, 7, 8, 9, 10, 50]
    said = []
    for number, of_step in enumerate(seconds):
        step(timer, clock, of_step)
        said += [(number, e["time/first_step_s"]) for e in timer.entries() if "time/first_step_s" in e]
    assert said == [(10, (30 - 5.5, 1.0))]
