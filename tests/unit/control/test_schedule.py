"""The channel schedule and the seeds of rollouts: pure functions of the step."""

from __future__ import annotations

from math import floor

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from coordexp.control import channel_share
from coordexp.control.schedule import (
    Channel,
    channel_at,
    num_b_steps,
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


RAMP = [(0, 0.0), (200, 0.0), (600, 0.3)]


def test_the_share_of_a_ramp_by_hand():
    # nothing for 200 steps; then 0.3 k / 400 at the k-th step of the ramp: 0.3 / 400 * (0 + ... + 399) = 59.85
    assert channel_share(200, RAMP) == 0.0
    assert channel_share(201, RAMP) == 0.0
    assert channel_share(202, RAMP) == pytest.approx(0.3 / 400)
    assert channel_share(600, RAMP) == pytest.approx(59.85)
    assert channel_share(1000, RAMP) == pytest.approx(59.85 + 400 * 0.3)


points = st.lists(
    st.tuples(st.integers(0, 300), ratios), min_size=1, max_size=5, unique_by=lambda p: p[0]
).map(sorted)


@given(points, st.integers(0, 400))
def test_the_share_is_the_sum_of_the_shares_of_the_steps_before(points, step):
    steps, values = zip(*points, strict=True)
    assert channel_share(step, points) == pytest.approx(
        np.interp(np.arange(step), steps, values).sum(), abs=1e-9
    )


@given(points)
def test_b_steps_of_points_follow_their_share_and_the_window_counts_them(points):
    is_b = [channel_at(step, points) is Channel.B for step in range(320)]
    for step in (0, 1, 57, 319):
        assert (
            sum(is_b[: step + 1]) == floor(channel_share(step + 1, points)) == num_b_steps(step + 1, points)
        )
        window = is_b[max(0, step - 199) : step + 1]
        assert realized_b_ratio(step, points) == sum(window) / len(window)


@given(ratios, st.integers(0, 400))
@example(0.145, 199)  # 7 r + 193 r would be the next number after 200 r, a whole one
def test_one_point_is_the_constant_ratio(b_ratio, step):
    assert channel_at(step, [(0, b_ratio)]) == channel_at(step, b_ratio)
    assert channel_at(step, [(7, b_ratio)]) == channel_at(step, b_ratio)


@pytest.mark.parametrize(
    ("points", "told"),
    [
        ([], "one or more"),
        ([(5, 0.1), (5, 0.2)], "ascending"),
        ([(-1, 0.1)], "from 0"),
        ([(0, 1.5)], "1.5 at step 0"),
    ],
)
def test_points_that_mean_nothing_are_refused(points, told):
    with pytest.raises(ConfigError, match=told):
        channel_share(3, points)
