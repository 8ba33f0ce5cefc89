"""How numbers are written on the console, and the tones that a terminal may show them in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.text import Text

HEAD, QUIET, GOOD, BAD = "bold", "dim", "green", "bold red"
"""Tones: of what a line is about, of what is said beside it, of news."""
BETWEEN = " · "
MARK = "!"
"""Behind a number outside its healthy range."""

Numbers = Mapping[str, float]
IsHealthy = Callable[[str, float, int], bool | None]
"""(key, number, optimizer step) -> whether it lies in the healthy range of the key; None where it has none."""


def four(value: float) -> str:
    """With four digits."""
    return f"{value:.4g}"


def prompted(text_steps: float) -> str:
    """How the steps of a record were prompted, from `latent/text_steps`: T by text, L by latent vectors, TL by both."""
    return {0.0: "L", 1.0: "T"}.get(text_steps, "TL")


def short(value: float) -> str:
    """With three digits."""
    return f"{value:.3g}"


def percent(value: float) -> str:
    """A fraction."""
    return f"{value:.0%}"


def large(value: float) -> str:
    """With three digits, in thousands, millions or billions."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


@dataclass(frozen=True)
class ShownNumber:
    """A number among others.  layout: what is written, with the number for `{}`."""

    key: str
    layout: str = "{}"
    write: Callable[[float], str] = four


class Writer:
    """Writes the numbers of one record.

    step: of the record.  is_healthy: numbers of which it is false get a mark.
    """

    def __init__(self, step: int, numbers: Numbers, is_healthy: IsHealthy) -> None:
        self.numbers, self._step, self._is_healthy = numbers, step, is_healthy

    def number(self, shown: ShownNumber) -> Text | None:
        """None where the record has no such number."""
        value = self.numbers.get(shown.key)
        if value is None:
            return None
        before, after = shown.layout.split("{}")
        return Text.assemble(before, self.marked(shown.key, value, shown.write(value)), after)

    def marked(self, key: str, value: float, written: str) -> Text:
        """`written`, marked where `value` is not healthy."""
        is_bad = not math.isfinite(value) or self._is_healthy(key, value, self._step) is False
        return Text(written + MARK, BAD) if is_bad else Text(written)

    def numbers_of(self, *shown: ShownNumber) -> list[Text]:
        """Those that the record has."""
        return [text for one in shown if (text := self.number(one)) is not None]


def line(head: str, parts: list[Text], *, tone: str = HEAD) -> Text:
    """`head`, and the parts behind it."""
    return Text(BETWEEN).join([Text(head, tone), *parts])


def below(head: str, parts: list[Text]) -> Text:
    """A line that belongs to the one above: `  head: part, part`."""
    return Text.assemble((f"  {head}: ", QUIET), Text(", ").join(parts))
