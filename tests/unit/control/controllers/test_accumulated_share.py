"""The channel schedule with a share that a controller moves."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.control.controllers.share import AccumulatedShare
from coordexp.control.schedule import channel_at, realized_b_ratio


@settings(deadline=None)
@given(ratio=st.sampled_from([0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0]))
def test_a_share_that_never_moves_is_the_schedule_of_its_number(ratio: float) -> None:
    share = AccumulatedShare()
    for step in range(300):
        assert share.next_channel(ratio) == channel_at(step, ratio)
        assert share.realized() == pytest.approx(realized_b_ratio(step, ratio))


def test_by_hand_of_a_share_that_moves() -> None:
    """0.5, 0.5, 0.25, 0.25, 0.25, 0.75 add up to 0.5, 1, 1.25, 1.5, 1.75, 2.5."""
    share = AccumulatedShare()
    assert "".join(share.next_channel(ratio) for ratio in (0.5, 0.5, 0.25, 0.25, 0.25, 0.75)) == "ABAAAB"
    assert share.realized() == pytest.approx(2 / 6)


@settings(max_examples=30, deadline=None)
@given(ratios=st.lists(st.floats(0, 1), min_size=1, max_size=80), at=st.integers(0, 80))
def test_a_resume_goes_on_with_what_was_added_up(ratios: list[float], at: int) -> None:
    whole, first, second = AccumulatedShare(), AccumulatedShare(), AccumulatedShare()
    expected = [whole.next_channel(ratio) for ratio in ratios]
    found = [first.next_channel(ratio) for ratio in ratios[:at]]
    second.restore(json.loads(json.dumps(first.state())))
    found += [second.next_channel(ratio) for ratio in ratios[at:]]
    assert found == expected
    assert second.state() == whole.state()
