"""The equations of the trajectory probe against numbers worked out by hand, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from coordexp.telemetry.trajectory import RunningVariance, trajectory

HIDDEN_TH = torch.tensor([[0, 0], [2, 0], [2, 2], [4, 2]], dtype=torch.float64)
"""Velocities (2, 0), (0, 2), (2, 0); turns (-2, 2), (2, -2)."""
METRIC_H = torch.tensor([2.0, 0.5], dtype=torch.float64)
"""Squared velocities 8 and 2, squared turns 10 and 10: R = sqrt(10 / 8), sqrt(10 / 2), speed = 4, 1."""


def test_hand_worked():
    found = trajectory(HIDDEN_TH, METRIC_H, eps=0.0)
    assert found["speed"].tolist() == pytest.approx([4.0, 1.0], rel=1e-15)
    assert found["R"].tolist() == pytest.approx([math.sqrt(5) / 2, math.sqrt(5)], rel=1e-15)
    assert found["lior"].tolist() == pytest.approx([2 * math.sqrt(5), math.sqrt(5)], rel=1e-15)


def test_eps_stands_beside_the_length_of_the_velocity():
    expected = [math.sqrt(10) / (math.sqrt(8) + 0.5), math.sqrt(10) / (math.sqrt(2) + 0.5)]
    assert trajectory(HIDDEN_TH, METRIC_H, eps=0.5)["R"].tolist() == pytest.approx(expected, rel=1e-15)


def test_float32_agrees():
    found = trajectory(HIDDEN_TH.float(), METRIC_H.float(), eps=1e-6)["lior"]
    assert found.tolist() == pytest.approx([2 * math.sqrt(5), math.sqrt(5)], rel=1e-6)


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_an_answer_that_is_too_short_has_none(num_tokens: int):
    found = trajectory(HIDDEN_TH[:num_tokens], METRIC_H, eps=1e-6)
    assert [len(values) for values in found.values()] == [0, 0, 0]


def test_standing_still_is_no_motion():
    found = trajectory(torch.ones(5, 2, dtype=torch.float64), METRIC_H, eps=1e-6)
    assert {name: values.tolist() for name, values in found.items()} == dict.fromkeys(found, [0.0] * 3)


def test_the_variance_of_pieces_is_that_of_all_rows():
    rows_TH = torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 100
    variance = RunningVariance(rows_TH[0])
    for piece in rows_TH.split([1, 19, 30]):
        variance.add(piece)
    expected_H = 1 / (rows_TH.var(0, unbiased=False) + 0.25)
    assert torch.allclose(variance.metric_H(0.25), expected_H, rtol=1e-13, atol=0)
