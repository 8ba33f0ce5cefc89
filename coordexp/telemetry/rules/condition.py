"""When a number is bad, as text that a person writes: `> 0.5`, `< best - 0.1 and rollout/recall < 0.5`. No torch.

A condition is clauses joined by `and`; all must hold. A clause is about the watched number, or about the one whose key
stands first. What is compared with:

    > 0.5                the value itself; also <, <=, >=, ==, !=
    < 0.6 x best         its best value before this record, by the direction that the catalogue knows
    < best - 0.1         likewise, with a distance
    > 3 x usual          the median of its last values (100 at most, 10 at least; those beyond the bound are left out)
    falls < 1% in 200    by how much its mean over 100 steps lies under that over the 100 steps before; also `rises`
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Operator = Literal["<", "<=", ">", ">=", "==", "!="]
_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_LEVELS = ("best", "usual")
_TRENDS = ("falls", "rises")
FORMS = "`> 0.5`, `< 0.6 x best`, `< best - 0.1`, `> 3 x usual` or `falls < 1% in 200`"
"""What a clause can look like."""


@dataclass(frozen=True, slots=True)
class Clause:
    """One comparison.

    key: of another number than the watched one.  op: how `factor * level + offset` is compared with; level None
    compares with `offset` alone.  trend: the percentage by which the number falls or rises over `span` steps is
    compared instead of its value.
    """

    key: str | None
    op: str
    offset: float
    level: str | None = None
    factor: float = 0.0
    trend: str | None = None
    span: int = 0

    def holds(self, value: float, level: float | None, change: float | None) -> bool:
        """Whether it is so.

        level: the best or usual value, where `level` names one.  change: relative growth of the number, where
        `trend` is set. False where what it compares with is not known yet.
        """
        compare = _COMPARE[self.op]
        if self.trend is not None:
            if change is None:
                return False
            return compare(-100.0 * change if self.trend == "falls" else 100.0 * change, self.offset)
        if self.level is None:
            return compare(value, self.offset)
        return level is not None and compare(value, self.factor * level + self.offset)


def parse_condition(text: str) -> tuple[Clause, ...]:
    """The clauses of a condition.

    Raises ValueError naming the clause that cannot be read.
    """
    return tuple(_clause(part) for part in _split(text.split()))


def _split(words: list[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word == "and":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def _clause(words: list[str]) -> Clause:
    key, rest = None, list(words)
    if len(rest) > 1 and rest[0] not in (*_COMPARE, *_TRENDS):
        key, rest = rest[0], rest[1:]
    try:
        if rest[0] in _TRENDS:
            trend, op, percent, word, span = rest
            if word != "in" or not percent.endswith("%") or op not in _COMPARE:
                raise ValueError
            return Clause(key, op, _number(percent[:-1]), trend=trend, span=_even(span))
        op, *compared = rest
        if op not in _COMPARE:
            raise ValueError
        level, factor, offset = _compared(compared)
        return Clause(key, op, offset, level, factor)
    except (ValueError, IndexError):
        shown = " ".join(words) or "(nothing)"
        raise ValueError(f"cannot read the clause `{shown}`; expected one such as {FORMS}") from None


def _compared(words: list[str]) -> tuple[str | None, float, float]:
    """(level, factor, offset) of what stands behind the operator."""
    if len(words) == 1 and words[0] not in _LEVELS:
        return None, 0.0, _number(words[0])
    if len(words) == 3 and words[1] == "x" and words[2] in _LEVELS:
        return words[2], _number(words[0]), 0.0
    if words[0] in _LEVELS and len(words) == 1:
        return words[0], 1.0, 0.0
    if words[0] in _LEVELS and len(words) == 3 and words[1] in ("+", "-"):
        offset = _number(words[2])
        return words[0], 1.0, offset if words[1] == "+" else -offset
    raise ValueError


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


def _even(text: str) -> int:
    span = int(text)
    if span < 2:
        raise ValueError
    return span
