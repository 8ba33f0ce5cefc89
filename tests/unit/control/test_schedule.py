"""The channel schedule and the seeds of rollouts: pure functions of the step."""

from __future__ import annotations

from math import floor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordexp.control.schedule import (
    Channel,
    channel_at,
    realized_b_ratio,
    request_seed,
    rollout_seed_base,
)
from coordexp.errors import ConfigError

ratios = st.integers(0, 1000).map(lambda thousandths: thousandths / 1000)


def channels(b_ratio: float, num_steps: int) -> str:
    return "".join(channel_at(step, b_ratio) for step in range(num_steps))


def test_hand_worked_schedules():
    assert channels(0.0, 6) == "AAAAAA"
    assert channels(1.0, 6) == "BBBBBB"
    assert channels(0.5, 6) == "ABABAB"
    assert channels(0.25, 8) == "AAABAAAB"
    # floor(0.3 (s + 1)) grows at s = 3, 6, 9: three of the first ten, and the same ten steps later.
    assert channels(0.3, 20) == "AAABAABAAB" * 2


def test_the_step_set_of_three_tenths_over_200_steps():
    found = {step for step in range(200) if channel_at(step, 0.3) is Channel.B}
    assert found == {10 * tens + units for tens in range(20) for units in (3, 6, 9)}


@given(ratios, st.integers(0, 10_000))
def test_as_many_b_steps_as_the_ratio_says_up_to_any_step(b_ratio, num_steps):
    num_b = sum(channel_at(step, b_ratio) is Channel.B for step in range(min(num_steps, 400)))
    assert num_b == floor(min(num_steps, 400) * b_ratio)


@given(ratios, st.integers(0, 5000))
def test_realized_ratio_counts_the_last_200_steps(b_ratio, step):
    window = [channel_at(s, b_ratio) is Channel.B for s in range(max(0, step - 199), step + 1)]
    assert realized_b_ratio(step, b_ratio) == sum(window) / len(window)


def test_channels_are_plain_strings_too():
    assert (channel_at(0, 1.0), channel_at(0, 0.0)) == ("B", "A")


def test_rollout_seeds():
    assert rollout_seed_base(42, 0) == 42
    assert rollout_seed_base(42, 3) == 42 + 3_000_009
    assert rollout_seed_base(7, 2**31) == (7 + 2**31 * 1_000_003) % 2**31
    assert request_seed(0x7FFFFFFF, 1) == 0


@pytest.mark.parametrize("b_ratio", [-0.1, 1.5, float("nan")])
def test_a_ratio_outside_its_range_is_refused(b_ratio):
    with pytest.raises(ConfigError, match=r"stage2_ab\.schedule\.b_ratio = .*expected a number from 0 to 1"):
        channel_at(0, b_ratio)


def test_a_negative_step_is_refused():
    with pytest.raises(ConfigError, match="optimizer step -1"):
        channel_at(-1, 0.5)
