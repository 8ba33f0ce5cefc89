"""Numbers of a window of the trajectory probe, from hidden rows made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from coordexp.metrics.catalog import lookup
from coordexp.trainers.probes.trajectory import AnswerRead, window_numbers


def read(rows: list[list[float]], nll: list[float]) -> AnswerRead:
    return AnswerRead(torch.tensor(rows, dtype=torch.float64), torch.tensor(nll))


def test_means_over_the_tokens_of_all_samples_in_one_metric():
    """All eight rows: first coordinate 0 2 2 4 0 0 4 4 (variance 3), second 0 0 2 2 0 2 2 4 (variance 2 - 1/4)."""
    reads = {
        "free": [read([[0, 0], [2, 0], [2, 2], [4, 2]], nll=[0.0, 1.0, 2.0, 3.0])],
        "nudged": [read([[0, 0], [0, 2], [4, 2]], nll=[0.5, 0.0, 0.5]), read([[4, 4]], nll=[3.0])],
    }
    numbers = window_numbers(reads, eps=0.0)
    g1, g2 = 1 / 3, 1 / 1.75
    turn = math.sqrt(4 * g1 + 4 * g2)
    R = (turn / math.sqrt(4 * g1), turn / math.sqrt(4 * g2))
    speed = (2 * g1, 2 * g2)
    assert numbers["trajectory/free/R_mean"] == pytest.approx(sum(R) / 2)
    assert numbers["trajectory/free/speed_mean"] == pytest.approx(sum(speed) / 2)
    assert numbers["trajectory/free/lior_mean"] == pytest.approx((R[0] * speed[0] + R[1] * speed[1]) / 2)
    nudged_R = math.sqrt(16 * g1 + 4 * g2) / math.sqrt(4 * g2)  # velocities (0, 2), (4, 0)
    assert numbers["trajectory/nudged/R_mean"] == pytest.approx(nudged_R)
    assert numbers["trajectory/nudged/speed_mean"] == pytest.approx(2 * g2)
    assert numbers["trajectory/nudged/lior_mean"] == pytest.approx(nudged_R * 2 * g2)
    assert numbers["trajectory/free/nll_mean"] == 1.5
    assert numbers["trajectory/nudged/nll_mean"] == 1.0  # of four tokens
    for name in ("lior", "R", "speed", "nll"):
        gap = numbers[f"trajectory/free/{name}_mean"] - numbers[f"trajectory/nudged/{name}_mean"]
        assert numbers[f"trajectory/gap/{name}_mean"] == pytest.approx(gap)
    assert [key for key in numbers if lookup(key) is None] == []


def test_answers_that_are_too_short_leave_their_numbers_out():
    reads = {
        "free": [read([[0, 0], [2, 1]], nll=[1.0, 3.0])],
        "nudged": [read([[0, 0], [0, 2], [4, 2]], nll=[1.0, 1.0, 1.0])],
    }
    numbers = window_numbers(reads, eps=1e-6)
    assert {key for key in numbers if "free" in key or "gap" in key} == {
        "trajectory/free/nll_mean",
        "trajectory/gap/nll_mean",
    }
    assert numbers["trajectory/gap/nll_mean"] == 1.0
