"""Which channel an optimizer step runs, and the seeds of its rollouts, from the step's number alone.

Nothing is remembered from step to step: all micro-batches and ranks agree, and a resumed run goes on as it would have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from fractions import Fraction
from itertools import pairwise

from coordexp.errors import ConfigError

SEED_MASK = 0x7FFFFFFF
_SEED_STRIDE = 1_000_003
REALIZED_WINDOW = 200
"""Optimizer steps that `stage2_ab/b_ratio_realized` looks back on."""


class Channel(StrEnum):
    """What a step teaches on."""

    A = "A"
    """Ground truth, with self-context iterations."""
    B = "B"
    """The model's own rollouts."""


Points = Sequence[tuple[int, float]]
"""(optimizer step, share of channel B there), steps ascending: linear between them, constant outside."""


def channel_share(step: int, points: Points) -> float:
    """Accumulated share of channel B before optimizer step `step`: the sum of the shares at steps 0 .. step - 1.

    Added up exactly and rounded once: equal shares r give `step * r`, however many points say so.

    Raises:
        ConfigError: points that `check_points` refuses, or a negative step.
    """
    check_points(points)
    if step < 0:
        raise ConfigError(f"optimizer step {step}: expected 0 or more.")
    exact = [(at, Fraction(ratio)) for at, ratio in points]
    first_step, first_ratio = exact[0]
    knots = [(0, first_ratio), *exact] if first_step > 0 else exact
    total = Fraction(0)
    for (start, low), (stop, high) in pairwise(knots):
        count = max(0, min(step, stop) - start)
        total += count * low + (high - low) / (stop - start) * Fraction(count * (count - 1), 2)
    last_step, last_ratio = knots[-1]
    return float(total + max(0, step - last_step) * last_ratio)


def check_points(points: Points) -> None:
    """ConfigError unless there is a point, steps are 0 or more and ascend, and shares are from 0 to 1."""
    steps = [step for step, _ in points]
    if not points or steps[0] < 0 or any(a >= b for a, b in pairwise(steps)):
        raise ConfigError(
            f"stage2_ab.schedule.b_ratio: the steps of its points are {steps}; expected one or more, from 0, ascending."
        )
    for step, ratio in points:
        if not 0 <= ratio <= 1:
            raise ConfigError(
                f"stage2_ab.schedule.b_ratio = {ratio!r} at step {step}: expected a number from 0 to 1."
            )


def num_b_steps(before: int, b_ratio: float | Points) -> int:
    """Channel-B steps among the optimizer steps 0 .. before - 1."""
    if isinstance(b_ratio, (int, float)):
        return math.floor(before * b_ratio)
    return math.floor(channel_share(before, b_ratio))


def channel_at(step: int, b_ratio: float | Points) -> Channel:
    """Channel of optimizer step `step` (0 for the first): B iff floor((step + 1) r) > floor(step r).

    For points it is B iff the whole part of `channel_share` grows with this step.

    Raises:
        ConfigError: `b_ratio` outside 0..1, points that `check_points` refuses, or a negative step.
    """
    if isinstance(b_ratio, (int, float)) and not 0 <= b_ratio <= 1:
        raise ConfigError(f"stage2_ab.schedule.b_ratio = {b_ratio!r}: expected a number from 0 to 1.")
    if step < 0:
        raise ConfigError(f"optimizer step {step}: expected 0 or more.")
    is_b = num_b_steps(step + 1, b_ratio) > num_b_steps(step, b_ratio)
    return Channel.B if is_b else Channel.A


def realized_b_ratio(step: int, b_ratio: float | Points, window: int = REALIZED_WINDOW) -> float:
    """Share of channel-B steps among the last `window` optimizer steps up to and including `step`."""
    first = max(0, step + 1 - window)
    return (num_b_steps(step + 1, b_ratio) - num_b_steps(first, b_ratio)) / (step + 1 - first)


def rollout_seed_base(seed: int, step: int) -> int:
    """Seed that the rollouts of an optimizer step count from: (seed + step * 1000003) & 0x7FFFFFFF."""
    return (seed + step * _SEED_STRIDE) & SEED_MASK


def policy_version_at(step: int) -> int:
    """Version of the trained weights before optimizer step `step`: 1 before the first, one more after each."""
    return step + 1


def request_seed(base: int, index: int) -> int:
    """Seed of the request with this index among all requests of the step, over all ranks."""
    return (base + index) & SEED_MASK
