"""What is wrong with a configuration, collected so that one run shows every mistake."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from coordexp.errors import ConfigError

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Place:
    """Where a value was written: a file and line, the command line, or another named source."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


PlaceOf = Callable[[KeyPath], Place | None]
"""Where one of our keys was written."""
WrittenOf = Callable[[str], tuple[str, Place | None]]
"""How and where an ms-swift argument was written."""

COMMAND_LINE = Place("command line")
DEFAULT = Place("default")


class _NoValue:
    """Marks a problem that is about a key, not about its value."""


NO_VALUE = _NoValue()


@dataclass(frozen=True)
class Problem:
    """One mistake: dotted path, value where it matters, place, and what was expected."""

    path: str
    text: str
    value: object = NO_VALUE
    place: Place | None = None

    @property
    def section(self) -> str:
        """The first part of the path."""
        return re.split(r"[.\[]", self.path, maxsplit=1)[0]

    def __str__(self) -> str:
        shown = "" if isinstance(self.value, _NoValue) else f" = {as_yaml(self.value)}"
        where = "" if self.place is None else f" in {self.place}"
        if self.place == COMMAND_LINE:
            where = " on the command line"
        return f"{self.path}{shown}{where}: {self.text}"


def raise_problems(problems: Sequence[Problem]) -> None:
    """ConfigError with every problem, one a line; nothing when there are none."""
    if len(problems) == 1:
        raise ConfigError(str(problems[0]))
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} problems:{lines}")


def dotted(path: Iterable[str | int]) -> str:
    """`("servers", 0, "url")` -> `servers[0].url`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def as_yaml(value: object) -> str:
    """A value as a user would write it on one line of YAML, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def closest(name: str, known: Iterable[str], *, cutoff: float = 0.5) -> str | None:
    """The known name most like `name`, or None when nothing is close. cutoff: likeness in [0, 1] that it takes."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def one_of(value: object, choices: Sequence[str]) -> str:
    """`expected one of a, b (did you mean a?)`, for a value that is none of them; without a full stop."""
    near = closest(str(value), choices)
    return f"expected one of {', '.join(choices)}" + (f" (did you mean {near}?)" if near else "")
