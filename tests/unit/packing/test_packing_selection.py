"""Segment selection: the oldest in, within capacity, never worse than first-in-first-out, deterministic."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordexp.errors import ContractError
from coordexp.packing.choice import select_segments


@st.composite
def buffers(draw, max_size: int = 40):
    capacity = draw(st.integers(1, 200))
    return draw(st.lists(st.integers(1, capacity), min_size=1, max_size=max_size)), capacity


def first_in_first_out(lengths: list[int], capacity: int) -> int:
    total = 0
    for length in lengths:
        total += length if total + length <= capacity else 0
    return total


def fullest(lengths: list[int], capacity: int) -> int:
    """Best total of any set that holds the oldest, by trying them all."""
    younger = lengths[1:]
    totals = (
        lengths[0] + sum(chosen)
        for size in range(len(lengths))
        for chosen in itertools.combinations(younger, size)
    )
    return max(total for total in totals if total <= capacity)


@given(buffers())
def test_a_pack_holds_the_oldest_within_capacity_in_order_of_arrival(buffer):
    lengths, capacity = buffer
    picked = select_segments(lengths, capacity)
    assert picked[0] == 0
    assert picked == sorted(set(picked))
    assert sum(lengths[index] for index in picked) <= capacity


@given(buffers())
def test_never_filled_worse_than_first_in_first_out(buffer):
    lengths, capacity = buffer
    picked = select_segments(lengths, capacity)
    assert sum(lengths[index] for index in picked) >= first_in_first_out(lengths, capacity)


@given(buffers(max_size=8))
def test_no_segment_that_was_left_out_would_still_fit(buffer):
    lengths, capacity = buffer
    picked = select_segments(lengths, capacity)
    total = sum(lengths[index] for index in picked)
    assert first_in_first_out(lengths, capacity) <= total <= fullest(lengths, capacity)
    assert all(total + length > capacity for index, length in enumerate(lengths) if index not in picked)


@given(buffers())
def test_a_buffer_is_emptied_pack_by_pack_and_every_segment_leaves_once(buffer):
    lengths, capacity = buffer
    waiting, left = list(range(len(lengths))), []
    while waiting:
        picked = select_segments([lengths[i] for i in waiting], capacity)
        left += [waiting[i] for i in picked]
        waiting = [segment for position, segment in enumerate(waiting) if position not in picked]
    assert sorted(left) == list(range(len(lengths)))


@given(buffers())
def test_the_choice_depends_on_the_values_only(buffer):
    lengths, capacity = buffer
    assert select_segments(np.array(lengths, dtype=np.int32), capacity) == select_segments(lengths, capacity)
    assert select_segments(tuple(lengths), capacity) == select_segments(lengths, capacity)


@pytest.mark.parametrize(
    ("lengths", "capacity", "expected"),
    [
        ([], 10, []),
        ([10], 10, [0]),
        ([4, 7, 6], 10, [0, 2]),  # the next in line does not fit, a later one does
        ([5, 3, 2, 4, 1], 10, [0, 1, 2]),  # full at once: 5 + 4 + 1 is as full and as small, but younger
        ([4, 3, 3, 6], 10, [0, 3]),  # 4 + 3 + 3 is as full but has more segments
        ([4, 5, 2, 4], 10, [0, 2, 3]),  # first-in-first-out stops at 9 of 10
        ([5, 5, 5, 5], 10, [0, 1]),  # equal twins: the smaller index
        ([3, 9, 9], 10, [0]),
    ],
)
def test_hand_worked_packs(lengths, capacity, expected):
    assert select_segments(lengths, capacity) == expected


def test_a_segment_that_can_never_fit_is_named_with_what_to_change():
    with pytest.raises(
        ContractError, match=r"segment 1 has 11 tokens but a pack holds 10: raise the packing length"
    ):
        select_segments([3, 11], 10)
    with pytest.raises(ContractError, match="segment 0 has length 0"):
        select_segments([0], 10)


@pytest.mark.parametrize(
    ("lengths", "capacity", "expected"),
    [([7, 4, 6, 2, 2], 15, [0, 2, 3]), ([9, 8, 1, 4, 20, 4, 6, 14, 8], 21, [0, 1, 3])],
)
def test_of_equal_lengths_the_earliest_is_taken(lengths, capacity, expected):
    assert select_segments(lengths, capacity) == expected
