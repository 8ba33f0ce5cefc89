"""What a rule and a healthy range are. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from coordexp.config.schema.telemetry import UserRule
from coordexp.metrics.catalog import EVAL_PREFIX
from coordexp.telemetry.rules.condition import Clause, parse_condition

STAGE1 = ("stage1_coord",)
STAGE2 = ("stage2_rollout_aligned", "stage2_two_channel")
"""Trainer variants of a stage."""


@dataclass(frozen=True, slots=True)
class HealthyRange:
    """Where a number of the catalogue lies when all is well.

    key: its name in training; an evaluation's number (`eval_`) has the same range.  low, high: bounds, both healthy
    themselves; None: none.  from_step: the first optimizer step at which it is expected.
    """

    key: str
    low: float | None = None
    high: float | None = None
    from_step: int = 0

    def holds(self, value: float) -> bool:
        """Whether a value lies inside."""
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


@dataclass(frozen=True, slots=True)
class WatchRule:
    """A red flag.

    keys: the numbers it watches, as logged, each by itself.  condition: when one is bad (`condition.py`).  for_steps,
    for_records: for how many optimizer steps, and how many records in a row, it must have been so.  from_step,
    from_share: records before that step, and before that share of the run's steps, are not judged.  variants: the
    trainer variants it is about, () for all.  audited: whether `coordexp audit` can tell the cause.
    """

    name: str
    keys: tuple[str, ...]
    condition: str
    meaning: str
    action: str
    for_steps: int = 0
    for_records: int = 1
    from_step: int = 0
    from_share: float = 0.0
    variants: tuple[str, ...] = ()
    audited: bool = False
    clauses: tuple[Clause, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "clauses", parse_condition(self.condition))

    def is_about(self, variant: str) -> bool:
        """Whether runs of a trainer variant are judged by it."""
        return not self.variants or variant in self.variants

    def begins(self, total_steps: int | None) -> float:
        """The first step at which it is judged; infinite where that is a share of a run of unknown length."""
        if not self.from_share:
            return float(self.from_step)
        return max(self.from_step, self.from_share * total_steps) if total_steps else float("inf")

    @property
    def how_long(self) -> str:
        """`for 50 steps, in 3 records`; empty where one record is enough."""
        parts = [f"for {self.for_steps} steps"] if self.for_steps else []
        parts += [f"in {self.for_records} records"] if self.for_records > 1 else []
        return ", ".join(parts)


def in_both(*keys: str) -> tuple[str, ...]:
    """Keys as training and as evaluations log them."""
    return tuple(prefix + key for key in keys for prefix in ("", EVAL_PREFIX))


def in_evaluations(*keys: str) -> tuple[str, ...]:
    """Keys as evaluations log them."""
    return tuple(EVAL_PREFIX + key for key in keys)


def rule_of(user: UserRule) -> WatchRule:
    """A rule from a run file. Raises ValueError for a condition that cannot be read."""
    return WatchRule(
        user.name,
        (user.key,),
        user.condition,
        user.meaning,
        user.action,
        for_steps=user.for_steps,
        for_records=user.for_records,
        from_step=user.from_step,
        from_share=user.from_share,
    )
