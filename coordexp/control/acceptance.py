"""Is what a run reached good enough for what comes after it? Pure decisions over logged numbers.

    judge(Criterion("eval_rollout/f1", ">=", 0.4, window=2), [(100, 0.3), (200, 0.45), (300, 0.47)])
    outcome(judgements)

A criterion fails where its number is missing or NaN: nothing is accepted for want of a number.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

from coordexp.errors import ConfigError

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}

VERDICT_FILE = "verdict.json"
"""What was decided of a stage, in its run folder; and of all stages, in theirs."""


class OnFail(StrEnum):
    """What a criterion that is not met leads to."""

    STOP = "stop"
    """No later stage starts."""
    WARN = "warn"
    """It is said, and the next stage starts."""
    BACK_TO_BEST = "back_to_best"
    """Later stages start from the best checkpoint instead of the last one."""


class Outcome(StrEnum):
    """What became of a stage that ended."""

    ACCEPTED = "accepted"
    WARNED = "warned"
    BACK_TO_BEST = "back_to_best"
    REFUSED = "refused"

    @property
    def goes_on(self) -> bool:
        """Whether later stages start."""
        return self is not Outcome.REFUSED


@dataclass(frozen=True)
class Reference:
    """A number that a run has logged.

    stage: whose; None for the run that is judged.  at: its last record, or that of its best checkpoint's step.
    """

    metric: str
    stage: str | None = None
    at: Literal["last", "best"] = "last"

    def __str__(self) -> str:
        of = "" if self.stage is None else f" of stage {self.stage}"
        return f"{self.metric}{of}" + (", best checkpoint" if self.at == "best" else "")


@dataclass(frozen=True)
class Criterion:
    """`metric` `op` `value`, of the mean of `window` records in a row.

    of: the metric is compared with `value` times this number.
    by_step: the mean has to be there in some window of records up to this step; None looks at the last window alone.
    """

    metric: str
    op: str
    value: float
    window: int = 1
    by_step: int | None = None
    on_fail: OnFail = OnFail.STOP
    of: Reference | None = None

    def __post_init__(self) -> None:
        if self.op not in OPERATORS:
            raise ConfigError(f"op = {self.op!r}: expected one of {', '.join(OPERATORS)}.")
        if self.window < 1:
            raise ConfigError(f"window = {self.window}: expected 1 or more records.")

    def __str__(self) -> str:
        mean = "" if self.window == 1 else f", mean of {self.window} records"
        by = "" if self.by_step is None else f", by step {self.by_step}"
        of = "" if self.of is None else f" x {self.of}"
        return f"{self.metric} {self.op} {self.value:g}{of}{mean}{by}"


@dataclass(frozen=True)
class Judgement:
    """What was found of a criterion. found, step: the mean that decided and the last step of its window, if any."""

    criterion: Criterion
    passed: bool
    reason: str
    found: float | None = None
    step: int | None = None


def judge(
    criterion: Criterion, series: Sequence[tuple[int, float]], reference: tuple[int, float] | None = None
) -> Judgement:
    """Hold a criterion against the records of its metric.

    series: (step, number) with steps ascending; NaN where a record had no finite number.
    reference: step and number of `criterion.of`; None where it was never logged.
    """
    if criterion.of is None:
        return _judged(criterion, series)
    if reference is None:
        return Judgement(criterion, False, f"{criterion.of} was never logged")
    step, number = reference
    if not math.isfinite(number):
        return Judgement(criterion, False, f"{criterion.of} is not finite at step {step}")
    told = _judged(replace(criterion, value=criterion.value * number, of=None), series)
    compared = f"{criterion.value:g} x {number:.6g} (step {step}) = {criterion.value * number:.6g}"
    return replace(told, criterion=criterion, reason=f"{told.reason}; {compared}")


def at_step(series: Sequence[tuple[int, float]], step: int | None = None) -> tuple[int, float] | None:
    """The record of a step, the last one without; None where there is none."""
    found = [record for record in series if step in (None, record[0])]
    return found[-1] if found else None


def _judged(criterion: Criterion, series: Sequence[tuple[int, float]]) -> Judgement:
    limit = criterion.by_step
    seen = [(step, value) for step, value in series if limit is None or step <= limit]
    until = "" if limit is None else f" up to step {limit}"
    if not seen:
        return Judgement(criterion, False, f"{criterion.metric} was never logged{until}")
    last_step, last = seen[-1]
    if not math.isfinite(last):
        return Judgement(
            criterion, False, f"{criterion.metric} is not finite at step {last_step}", None, last_step
        )
    if len(seen) < criterion.window:
        return Judgement(
            criterion,
            False,
            f"{criterion.metric} was logged {len(seen)} times{until}, fewer than the window of {criterion.window}",
        )
    means = _window_means(seen, criterion.window)
    holds = OPERATORS[criterion.op]
    looked_at = means[-1:] if limit is None else means
    met = [(step, mean) for step, mean in looked_at if holds(mean, criterion.value)]
    if met:
        step, mean = met[0]
        return Judgement(criterion, True, f"{mean:.6g} at step {step}", mean, step)
    finite = [(step, mean) for step, mean in looked_at if math.isfinite(mean)]
    if not finite:
        return Judgement(criterion, False, f"{criterion.metric} is not finite in its window", None, last_step)
    wants_more = criterion.op in (">=", ">")
    step, mean = (max if wants_more else min)(finite, key=lambda found: found[1])
    return Judgement(criterion, False, f"{mean:.6g} at step {step}", mean, step)


def outcome(judgements: Sequence[Judgement]) -> Outcome:
    """The gravest of what the failed criteria lead to; accepted without any."""
    leads_to = {
        OnFail.STOP: Outcome.REFUSED,
        OnFail.BACK_TO_BEST: Outcome.BACK_TO_BEST,
        OnFail.WARN: Outcome.WARNED,
    }
    asked = {one.criterion.on_fail for one in judgements if not one.passed}
    return next((found for what, found in leads_to.items() if what in asked), Outcome.ACCEPTED)


def _window_means(series: Sequence[tuple[int, float]], window: int) -> list[tuple[int, float]]:
    """(last step, mean) of every `window` records in a row; NaN where one of them is not finite."""
    values = [value for _, value in series]
    return [(series[end - 1][0], _mean(values[end - window : end])) for end in range(window, len(series) + 1)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan
