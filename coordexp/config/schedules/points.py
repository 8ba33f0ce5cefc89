"""Numbers that may change over a run: one number, or points [[step, number], ...] with ascending steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import PlainValidator

POINTS = "points [[step, number], ...]"
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Bounds:
    """Which numbers are taken.

    expected: in words, after "expected".
    """

    expected: str
    takes: Callable[[float], bool]

    def number(self, value: object, refusal: str | None = None) -> float:
        """`value` as a float; ValueError (`refusal`, or what was expected) for anything else."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(refusal or f"expected {self.expected}")
        if not math.isfinite(value) or not self.takes(value):
            raise ValueError(refusal or f"expected {self.expected}")
        return float(value)

    def points(self, value: object) -> Points:
        """A list of points; ValueError for anything else."""
        if not isinstance(value, list):
            raise ValueError(f"expected {POINTS}, each number {self.expected}")
        if not value:
            raise ValueError(f"holds no point; expected {POINTS}, each number {self.expected}")
        points = [self._point(point) for point in value]
        steps = [step for step, _ in points]
        if steps != sorted(set(steps)):
            raise ValueError(f"the steps of its points are {steps}; expected ascending ones")
        return points

    def number_or_points(self, value: object) -> float | Points:
        """Either; ValueError for anything else."""
        if isinstance(value, list):
            return self.points(value)
        return self.number(value, f"expected {self.expected}, or {POINTS}")

    def null_number_or_points(self, value: object) -> float | Points | None:
        """As `number_or_points`; null is taken, too."""
        return None if value is None else self.number_or_points(value)

    def _point(self, point: object) -> tuple[int, float]:
        if not isinstance(point, (list, tuple)) or len(point) != 2:
            raise ValueError(f"found {point!r} for a point; expected [step, {self.expected}]")
        step, number = point
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"the step of {list(point)} is {step!r}; expected a whole number from 0")
        return step, self.number(
            number, f"the number of {list(point)} is {number!r}; expected {self.expected}"
        )


def _warmup(value: object) -> dict[str, Points]:
    """Points of every named weight; ValueError for anything else."""
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a mapping of weights to {POINTS}")
    return {str(name): _named(str(name), points) for name, points in value.items()}


def _named(name: str, points: object) -> Points:
    try:
        return FACTOR.points(points)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def check_warmup(warmup: Mapping[str, Points], weights: Mapping[str, float]) -> None:
    """ValueError for a name that is none of the `weights`, or whose weight is 0."""
    for name in warmup:
        if name not in weights:
            raise ValueError(
                f"warmup.{name}: there is no such weight here; expected one of {', '.join(weights)}"
            )
        if not weights[name]:
            raise ValueError(f"warmup.{name} cannot take effect: {name} is 0")


FACTOR = Bounds("a number from 0", lambda number: number >= 0)
SHARE = Bounds("a number from 0 to 1", lambda number: 0 <= number <= 1)
POSITIVE = Bounds("a number above 0", lambda number: number > 0)

ShareOrPoints = Annotated[float | Points, PlainValidator(SHARE.number_or_points)]
PositiveOrPoints = Annotated[float | Points, PlainValidator(POSITIVE.number_or_points)]
PositiveOrPointsOrNull = Annotated[float | Points | None, PlainValidator(POSITIVE.null_number_or_points)]

Warmup = Annotated[dict[str, Points], PlainValidator(_warmup)]

WARMUP = (
    "Factors on weights, by name: `{w1_weight: [[0, 0.0], [200, 1.0]]}` brings that weight in over 200 steps. Points "
    "[[step, factor], ...], linear between them and constant outside (evaluation takes the last point's); the step "
    "alone decides."
)
SIGMA = (
    "Width of the Gaussian target, in bins; or points [[step, sigma], ...], linear between them and constant outside "
    "(evaluation takes the last point's)."
)
SIGMA_PER_SIDE = (
    "null: every coordinate has target_sigma. A number c: a coordinate of a box has sigma = c times the box's side "
    "along its axis (the width for x, the height for y, in bins), but never less than target_sigma, which vertices of "
    "polygons keep. Points, too."
)
