"""One thing that was looked at: how bad, what was seen, what to do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """In the order of a report."""

    ERROR = "error"
    """Something will fail."""
    WARNING = "warning"
    """It may fail, or is slow."""
    NOTE = "note"
    """Not here, or not looked at; not needed by everybody."""
    FINE = "fine"


@dataclass(frozen=True)
class MachineFinding:
    """check: what was looked at.  seen: in a sentence.  do: in a sentence; empty where nothing is to be done."""

    check: str
    severity: Severity
    seen: str
    do: str = ""

    def __str__(self) -> str:
        return f"{self.severity}: {self.check}: {self.seen}" + (f" {self.do}" if self.do else "")

    def to_json(self) -> dict[str, str]:
        """As JSON values."""
        return {"check": self.check, "severity": str(self.severity), "seen": self.seen, "do": self.do}


def fine(check: str, seen: str) -> MachineFinding:
    """Nothing to do."""
    return MachineFinding(check, Severity.FINE, seen)


def note(check: str, seen: str, do: str = "") -> MachineFinding:
    """Worth knowing."""
    return MachineFinding(check, Severity.NOTE, seen, do)


def warning(check: str, seen: str, do: str) -> MachineFinding:
    """May fail."""
    return MachineFinding(check, Severity.WARNING, seen, do)


def error(check: str, seen: str, do: str) -> MachineFinding:
    """Will fail."""
    return MachineFinding(check, Severity.ERROR, seen, do)
