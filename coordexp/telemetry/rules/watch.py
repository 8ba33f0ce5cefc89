"""Judges the records of a run by rules, one after another. A pure function; its state is JSON. No torch.

judge = Judge(rules, total_steps)
state = WatchState()
state, findings = judge(state, payload)               # everything that is wrong at this record
state, fresh = due(state, findings, step)             # what was not said in the last 200 steps
write(state.to_json()); state = WatchState.from_json(read())    # a resumed run goes on
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from coordexp.metrics.catalog import EVAL_PREFIX, lookup
from coordexp.telemetry.rules.condition import Clause
from coordexp.telemetry.rules.rule import WatchRule

USUAL_OF, USUAL_FROM = 100, 10
"""The usual value is the median of so many last values at most, and at least."""
REPEAT_AFTER = 200
"""Optimizer steps before the same rule is said again."""


@dataclass(frozen=True, slots=True)
class RuleFinding:
    """A rule that holds at a record. since: the first step in a row at which its condition held."""

    rule: str
    key: str
    value: float
    step: int
    since: int
    message: str
    audited: bool = False

    def to_json(self) -> dict[str, Any]:
        """Its fields as JSON values."""
        return {
            "rule": self.rule,
            "key": self.key,
            "value": self.value,
            "step": self.step,
            "since": self.since,
            "message": self.message,
        }


@dataclass(frozen=True, slots=True)
class _Trend:
    """Means over two halves of a span, one behind the other: (sum, count) each.

    start: the step at which the second half begins.  change: relative growth from the last half to the one before.
    """

    start: int
    first: tuple[float, int] = (0.0, 0)
    second: tuple[float, int] = (0.0, 0)
    change: float | None = None

    def add(self, value: float, step: int, span: int) -> _Trend:
        half = max(1, span // 2)
        if step - self.start < half:
            return replace(self, second=(self.second[0] + value, self.second[1] + 1))
        change = None if step - self.start >= 2 * half else _growth(self.first, self.second)
        first = self.second if step - self.start < 2 * half else (0.0, 0)
        return _Trend(step - (step - self.start) % half, first, (value, 1), change)


def _growth(first: tuple[float, int], second: tuple[float, int]) -> float | None:
    if not first[1] or not second[1] or first[0] == 0:
        return None
    before, after = first[0] / first[1], second[0] / second[1]
    return (after - before) / abs(before)


@dataclass(frozen=True, slots=True)
class WatchState:
    """What is remembered of earlier records.

    held: rule and key -> (first step, number of records) of the records in a row at which its condition held.  best:
    key -> best value.  usual: key -> last values.  trends: key and span -> its halves.  said: rule -> step.
    """

    held: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    best: Mapping[str, float] = field(default_factory=dict)
    usual: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    trends: Mapping[str, _Trend] = field(default_factory=dict)
    said: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "held": {name: list(pair) for name, pair in self.held.items()},
            "best": dict(self.best),
            "usual": {key: list(values) for key, values in self.usual.items()},
            "trends": {
                name: [trend.start, list(trend.first), list(trend.second), trend.change]
                for name, trend in self.trends.items()
            },
            "said": dict(self.said),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> WatchState:
        """From what `to_json` gave."""
        return cls(
            held={name: (int(since), int(number)) for name, (since, number) in content["held"].items()},
            best={key: float(value) for key, value in content["best"].items()},
            usual={key: tuple(map(float, values)) for key, values in content["usual"].items()},
            trends={
                name: _Trend(int(start), (first[0], int(first[1])), (second[0], int(second[1])), change)
                for name, (start, first, second, change) in content["trends"].items()
            },
            said={name: int(step) for name, step in content["said"].items()},
        )


class Judge:
    """Applies rules to records. Remembers nothing: what is remembered goes in and out.

    total_steps: of the run, for rules that begin at a share of it.
    """

    def __init__(self, rules: Sequence[WatchRule], total_steps: int | None = None) -> None:
        self._watched = [
            (rule, key, f"{rule.name}|{key}", rule.begins(total_steps), _resolved(rule.clauses, key))
            for rule in rules
            for key in rule.keys
        ]
        clauses = [(clause, clause.key or "") for *_, resolved in self._watched for clause in resolved]
        self._best = {key: _sign(key) for clause, key in clauses if clause.level == "best"}
        self._usual: dict[str, list[Clause]] = {}
        for clause, key in clauses:
            if clause.level == "usual":
                self._usual.setdefault(key, []).append(clause)
        spans = ((key, clause.span) for clause, key in clauses if clause.trend is not None)
        self._spans = tuple(dict.fromkeys(spans))  # in one order, in which checkpoints keep them

    def __call__(
        self, state: WatchState, step: int, metrics: Mapping[str, float]
    ) -> tuple[WatchState, tuple[RuleFinding, ...]]:
        """The state after a record, and everything that is wrong at it.

        metrics: of one record, under the keys as logged.
        """
        trends = self._moved(state.trends, step, metrics)
        usual = {key: median(values) for key, values in state.usual.items() if len(values) >= USUAL_FROM}
        held, findings = dict(state.held), []
        for rule, key, name, begins, clauses in self._watched:
            if key not in metrics:
                continue
            if step < begins or not all(
                _holds(clause, metrics, state.best, usual, trends) for clause in clauses
            ):
                held.pop(name, None)
                continue
            since, number = held.get(name, (step, 0))
            held[name] = (since, number + 1)
            if step - since >= rule.for_steps and number + 1 >= rule.for_records:
                findings.append(_finding(rule, key, float(metrics[key]), step, since))
        after = WatchState(
            held,
            self._bettered(state.best, metrics),
            self._remembered(state.usual, usual, metrics),
            trends,
            state.said,
        )
        return after, tuple(findings)

    def _bettered(self, best: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
        """Best values with those of a record."""
        after = dict(best)
        for key, sign in self._best.items():
            if key in metrics:
                value = float(metrics[key])
                after[key] = sign * max(sign * after.get(key, value), sign * value)
        return after

    def _remembered(
        self,
        before: Mapping[str, tuple[float, ...]],
        usual: Mapping[str, float],
        metrics: Mapping[str, float],
    ) -> dict[str, tuple[float, ...]]:
        """Last values with those of a record, but for the ones that a clause calls unusual."""
        after = dict(before)
        for key, clauses in self._usual.items():
            value = metrics.get(key)
            if value is None or any(clause.holds(value, usual.get(key), None) for clause in clauses):
                continue
            after[key] = (*after.get(key, ()), float(value))[-USUAL_OF:]
        return after

    def _moved(
        self, before: Mapping[str, _Trend], step: int, metrics: Mapping[str, float]
    ) -> Mapping[str, _Trend]:
        moved = {}
        for key, span in self._spans:
            if key in metrics:
                name = f"{key}|{span}"
                moved[name] = before.get(name, _Trend(step)).add(float(metrics[key]), step, span)
        return {**before, **moved}


def due(
    state: WatchState, findings: Sequence[RuleFinding], step: int, repeat_after: int = REPEAT_AFTER
) -> tuple[WatchState, tuple[RuleFinding, ...]]:
    """Findings of rules that were not said in the last `repeat_after` steps, and the state in which they are."""
    fresh = tuple(
        finding
        for finding in findings
        if step - state.said.get(finding.rule, step - repeat_after) >= repeat_after
    )
    return replace(state, said={**state.said, **{finding.rule: step for finding in fresh}}), fresh


def _resolved(clauses: Sequence[Clause], watched: str) -> tuple[Clause, ...]:
    """Clauses with the key each is about; beside an evaluation's number stand those of that evaluation."""
    prefix = EVAL_PREFIX if watched.startswith(EVAL_PREFIX) else ""
    return tuple(
        replace(
            clause, key=watched if clause.key is None else prefix + clause.key.removeprefix(prefix or " ")
        )
        for clause in clauses
    )


def _holds(
    clause: Clause,
    metrics: Mapping[str, float],
    best: Mapping[str, float],
    usual: Mapping[str, float],
    trends: Mapping[str, _Trend],
) -> bool:
    key = clause.key or ""
    value = metrics.get(key)
    if value is None:
        return False
    level = best.get(key) if clause.level == "best" else usual.get(key) if clause.level == "usual" else None
    trend = trends.get(f"{key}|{clause.span}") if clause.trend is not None else None
    return clause.holds(value, level, None if trend is None else trend.change)


def _finding(rule: WatchRule, key: str, value: float, step: int, since: int) -> RuleFinding:
    how_long = f" {rule.how_long}" if rule.how_long else ""
    message = f"{key} = {value:.4g} ({rule.condition}{how_long}): {rule.meaning}. What to do: {rule.action}."
    return RuleFinding(rule.name, key, value, step, since, message, rule.audited)


def _sign(key: str) -> float:
    """1 where more of a number is better, -1 where less is."""
    spec = lookup(key)
    return -1.0 if spec is not None and spec.better == "lower" else 1.0
