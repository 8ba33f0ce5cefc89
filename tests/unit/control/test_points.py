"""Numbers that change over a run, by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.control.points import last_value, value_at

POINTS = [(100, 16.0), (300, 4.0), (400, 4.0), (500, 0.5)]


@pytest.mark.parametrize(
    ("step", "value"),
    [
        (0, 16.0),  # constant before the first point
        (100, 16.0),
        (150, 13.0),  # 16 - 12 * 50 / 200
        (300, 4.0),
        (350, 4.0),
        (450, 2.25),  # half way from 4 to 0.5
        (500, 0.5),
        (9999, 0.5),  # constant behind the last
    ],
)
def test_a_line_between_points_and_constant_outside(step: int, value: float) -> None:
    assert value_at(step, POINTS) == value


def test_a_number_is_itself_at_any_step_and_a_run_ends_with_the_last_point() -> None:
    assert [value_at(step, 2) for step in (0, 7)] == [2.0, 2.0]
    assert last_value(2) == 2.0
    assert last_value(POINTS) == 0.5


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1000), st.floats(0, 100)), min_size=1, unique_by=lambda point: point[0]
    ),
    st.integers(0, 1100),
)
def test_the_value_lies_between_its_neighbours(points: list[tuple[int, float]], step: int) -> None:
    points.sort()
    before = [number for at, number in points if at <= step] or [points[0][1]]
    behind = [number for at, number in points if at >= step] or [points[-1][1]]
    low, high = sorted((before[-1], behind[0]))
    assert low - 1e-9 <= value_at(step, points) <= high + 1e-9
