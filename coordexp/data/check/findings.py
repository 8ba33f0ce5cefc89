"""What a check found: one sentence, how often, and where."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from coordexp.errors import RecordError

MAX_EXAMPLES = 5
_ONE_OR_SEVERAL = re.compile(r"\[([^|\[\]]*)\|([^|\[\]]*)\]")


class Level(StrEnum):
    """How bad it is."""

    ERROR = "error"
    """Import and training refuse it."""
    WARNING = "warning"
    """Most likely a mistake, and nothing that a program can decide."""
    NOTE = "note"
    """What becomes of the data on the way."""


@dataclass(frozen=True)
class Finding:
    """One kind of thing that was found.

    kind: a short name that stays the same.  message: what was found, what it means and what to do.
    count: of the things it was found in.  examples: places, at most `MAX_EXAMPLES`.
    images: rows of images it was found in, for the contact sheet.
    """

    level: Level
    kind: str
    message: str
    count: int = 1
    examples: tuple[str, ...] = ()
    images: tuple[int, ...] = ()

    def __str__(self) -> str:
        if not self.examples:
            return self.message
        more = f" and {self.count - len(self.examples)} more" if self.count > len(self.examples) else ""
        return f"{self.message} ({', '.join(self.examples)}{more})"


def found(
    level: Level,
    kind: str,
    message: str,
    rows: Sequence[int],
    name: Callable[[int], str],
    images: Iterable[int] = (),
) -> Finding | None:
    """A finding in every one of `rows`, None without any.

    message: may hold `{count}`, and `[box lies|boxes lie]` for one and for several.  name: how messages call a row.
    """
    if not rows:
        return None
    examples = tuple(name(row) for row in rows[:MAX_EXAMPLES])
    return Finding(
        level, kind, numbered(message, len(rows)), len(rows), examples, tuple(dict.fromkeys(images))
    )


def numbered(message: str, count: int) -> str:
    """A message with its `{count}`, and of every `[one|several]` the words that agree with it."""
    chosen = _ONE_OR_SEVERAL.sub(lambda match: match[1] if count == 1 else match[2], message)
    return chosen.replace("{count}", str(count))


def raise_errors(findings: Iterable[Finding], prefix: str = "") -> None:
    """RecordError with the first error, saying how many kinds of errors there are beside it."""
    errors = [finding for finding in findings if finding.level is Level.ERROR]
    if errors:
        others = numbered("{count} other [kind|kinds] of error", len(errors) - 1)
        more = f" (and {others})" if len(errors) > 1 else ""
        raise RecordError(f"{prefix}{errors[0]}{more}. `coordexp data check` shows everything.")
