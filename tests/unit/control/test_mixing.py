"""Shares of data sets: within one sample of the weights at every moment, from the sample's number alone."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.control.mixing import FINEST, MixSchedule, parts_of

WEIGHTS = st.lists(st.integers(1, 60), min_size=1, max_size=9)


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ([1], (1,)),
        ([3, 1], (3, 1)),
        ([0.7, 0.3], (7, 3)),
        ([0.5, 0.3, 0.2], (5, 3, 2)),
        ([1, 1, 1], (1, 1, 1)),
        ([0.1, 0.2], (1, 2)),  # as written, not as a binary fraction
        ([118287, 100170], (4381, 3710)),
    ],
)
def test_shares_are_exact(weights, parts):
    assert parts_of(weights) == parts


def test_awkward_shares_are_rounded_to_a_millionth():
    weights = [0.123456789, 0.3456789123, 0.53086429881]
    parts = parts_of(weights)
    assert sum(parts) == FINEST
    for part, weight in zip(parts, weights, strict=True):
        assert abs(Fraction(part, FINEST) - Fraction(str(weight))) < Fraction(1, FINEST)


@pytest.mark.parametrize("weights", [[1, 0], [1, -1], [float("inf"), 1], [1, 1e-9]])
def test_weights_that_give_no_share(weights):
    with pytest.raises(ValueError, match="weights"):
        parts_of(weights)


def test_three_to_one():
    which = [MixSchedule.of([3, 1]).at(n) for n in range(8)]
    assert which == [(0, 0), (0, 1), (0, 2), (1, 0), (0, 3), (0, 4), (0, 5), (1, 1)]


@given(weights=WEIGHTS)
@settings(max_examples=60, deadline=None)
def test_shares_hold_at_every_moment(weights):
    schedule = MixSchedule.of(weights)
    numbers = range(2 * schedule.round_length + 3)
    drawn = [schedule.at(n) for n in numbers]
    shown_so_far = np.arange(1, len(drawn) + 1)
    for i, weight in enumerate(weights):
        given_so_far = np.cumsum([which == i for which, _ in drawn])
        assert np.abs(given_so_far - shown_so_far * weight / sum(weights)).max() < 1
        # and every sample of it comes once, in order
        assert [before for which, before in drawn if which == i] == list(range(given_so_far[-1]))


@given(weights=WEIGHTS, num_samples=st.integers(1, 500), data=st.data())
@settings(max_examples=60, deadline=None)
def test_length_until_a_data_set_has_given_enough(weights, num_samples, data):
    which = data.draw(st.integers(0, len(weights) - 1))
    schedule = MixSchedule.of(weights)
    length = schedule.length_until(which, num_samples)
    assert schedule.at(length - 1) == (which, num_samples - 1)
