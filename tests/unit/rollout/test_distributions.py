"""Distributions kept beside an answer stand for those they were made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.eval.predictions.box_confidence import expected_iou, probs_of_atoms
from coordexp.rollout.decoding.distributions import NotedDistributions, distribution_of, summarise

IDS = list(range(20, 1020))
VOCAB = 1100


def scores_of(probs_BK, mass):
    """Scores of rows whose coordinate tokens hold `mass`, distributed as given; the rest is on token 0."""
    scores = torch.full((len(probs_BK), VOCAB), -1e9, dtype=torch.float64)
    scores[:, IDS] = (torch.as_tensor(probs_BK) * mass).clamp(min=1e-300).log()
    scores[:, 0] = np.log(1 - mass) if mass < 1 else -1e9
    return scores.float()


def kept(probs_BK, mass=1.0):
    return [distribution_of(row) for row in summarise(scores_of(probs_BK, mass), torch.tensor(IDS)).tolist()]


def test_a_sharp_distribution_is_kept_as_it_is():
    probs = np.zeros((1, 1000))
    probs[0, [7, 8, 990]] = [0.7, 0.2, 0.1]
    [one] = kept(probs, mass=0.75)
    assert one.mass == pytest.approx(0.75, abs=1e-6)
    assert one.bins == (7, 8, 990)
    assert one.weights == pytest.approx((0.7, 0.2, 0.1), abs=1e-6)


def test_a_flat_distribution_becomes_its_quantiles():
    [one] = kept(np.full((1, 1000), 1e-3))
    # 32 bins as they are, and 968 / 1000 of the mass on every 30th of the others
    assert one.weights == pytest.approx((1e-3,) * 32 + (0.968 / 32,) * 32, abs=1e-6)
    rest = sorted(set(range(1000)) - set(one.bins[:32]))
    places = [rest.index(k) for k in one.bins[32:]]
    assert np.abs(np.array(places) - (np.arange(32) + 0.5) / 32 * 968).max() <= 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), width=st.sampled_from([0.4, 3.0, 12.0, 40.0, 150.0]))
def test_the_expected_iou_survives(seed, width):
    """Around the corners of a box, with some mass elsewhere, narrow to wide."""
    rng = np.random.default_rng(seed)
    corners = np.array([200, 300, 620, 700]) + rng.integers(-90, 90, 4)
    bins = np.arange(1000)
    probs = (
        np.exp(-((bins - corners[:, None]) ** 2) / (2 * width**2))
        + rng.dirichlet(np.full(1000, 0.01), 4) * 0.2
    )
    probs /= probs.sum(axis=1, keepdims=True)
    box = tuple(probs.argmax(axis=1))
    atoms = np.stack([probs_of_atoms(one.bins, one.weights) for one in kept(probs)])
    assert expected_iou(atoms, box) == pytest.approx(expected_iou(probs, box), abs=0.01)


def test_the_processor_keeps_one_entry_for_each_coordinate_of_an_answer():
    noted = NotedDistributions(IDS, torch.device("cpu"))
    first, second = np.zeros((2, 1000)), np.zeros((2, 1000))
    first[0, 5] = first[1, 6] = second[0, 50] = second[1, 60] = 1.0
    for probs in (first, second):
        scores = scores_of(probs, 0.9)
        assert noted(torch.zeros(2, 3, dtype=torch.long), scores) is scores
    answers = noted.finish([[IDS[5], IDS[49]], [3]])
    assert [[one and one.bins for one in answer] for answer in answers] == [[(5,), (50,)], [None]]
