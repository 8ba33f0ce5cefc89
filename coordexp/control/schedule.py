"""Which channel an optimizer step runs, and the seeds of its rollouts, from the step's number alone.

Nothing is remembered from step to step: all micro-batches and ranks agree, and a resumed run goes on as it would have.
"""

from __future__ import annotations

import math
from enum import StrEnum

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


def channel_at(step: int, b_ratio: float) -> Channel:
    """Channel of optimizer step `step` (0 for the first): B iff floor((step + 1) r) > floor(step r).

    Raises:
        ConfigError: `b_ratio` outside 0..1, or a negative step.
    """
    if not 0 <= b_ratio <= 1:
        raise ConfigError(f"stage2_ab.schedule.b_ratio = {b_ratio!r}: expected a number from 0 to 1.")
    if step < 0:
        raise ConfigError(f"optimizer step {step}: expected 0 or more.")
    is_b = math.floor((step + 1) * b_ratio) > math.floor(step * b_ratio)
    return Channel.B if is_b else Channel.A


def realized_b_ratio(step: int, b_ratio: float, window: int = REALIZED_WINDOW) -> float:
    """Share of channel-B steps among the last `window` optimizer steps up to and including `step`."""
    first = max(0, step + 1 - window)
    num_b = math.floor((step + 1) * b_ratio) - math.floor(first * b_ratio)
    return num_b / (step + 1 - first)


def rollout_seed_base(seed: int, step: int) -> int:
    """Seed that the rollouts of an optimizer step count from: (seed + step * 1000003) & 0x7FFFFFFF."""
    return (seed + step * _SEED_STRIDE) & SEED_MASK


def policy_version_at(step: int) -> int:
    """Version of the trained weights before optimizer step `step`: 1 before the first, one more after each."""
    return step + 1


def request_seed(base: int, index: int) -> int:
    """Seed of the request with this index among all requests of the step, over all ranks."""
    return (base + index) & SEED_MASK
