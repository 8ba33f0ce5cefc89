"""Numbers that may change over a run: one number, or points (optimizer step, number) with a line between each two.

A number is a function of the step alone, so a resumed run goes on as it would have, and all ranks agree.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

Points = Sequence[tuple[int, float]]
"""Steps ascending: linear between them, constant before the first and after the last."""
Number = float | Points


def value_at(step: int, number: Number) -> float:
    """The number at optimizer step `step` (0 for the first)."""
    if isinstance(number, (int, float)):
        return float(number)
    after = bisect_right(number, step, key=lambda point: point[0])
    if after == 0 or after == len(number):
        return float(number[max(0, after - 1)][1])
    (start, low), (stop, high) = number[after - 1], number[after]
    return float(low + (high - low) * ((step - start) / (stop - start)))


def last_value(number: Number) -> float:
    """The number that a run ends with, if it lasts long enough."""
    return float(number) if isinstance(number, (int, float)) else float(number[-1][1])
