"""What an audit says: one line per question, passed or not, with the first difference in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coordexp.errors import CoordExpError
from coordexp.files import write_json


@dataclass(frozen=True)
class AuditLine:
    """passed: None when the question could not be put, with the reason in `detail`."""

    area: str
    question: str
    passed: bool | None
    detail: str

    @property
    def verdict(self) -> str:
        return {True: "PASS", False: "FAIL", None: "skip"}[self.passed]


class DifferenceError(CoordExpError):
    """The first difference that a check found."""


def ask(area: str, question: str, check: Callable[[], str]) -> AuditLine:
    """Run a check: it returns what it looked at, or raises the first difference, or what kept it from looking."""
    try:
        return AuditLine(area, question, True, check())
    except CoordExpError as difference:
        return AuditLine(area, question, False, str(difference))


def skip(area: str, question: str, why: str) -> AuditLine:
    """A question that could not be put."""
    return AuditLine(area, question, None, why)


def print_findings(findings: Sequence[AuditLine], console: Any) -> None:
    """The table on a rich console."""
    from rich.table import Table

    table = Table("", "area", "question", "found", expand=True)
    colours = {"PASS": "green", "FAIL": "bold red", "skip": "dim"}
    for one in findings:
        table.add_row(f"[{colours[one.verdict]}]{one.verdict}[/]", one.area, one.question, one.detail)
    console.print(table)


def write_findings(path: Path, findings: Sequence[AuditLine], about: dict[str, Any]) -> None:
    """The same as JSON: `passed` is true when no question failed."""
    passed = all(one.passed is not False for one in findings)
    write_json(path, {**about, "passed": passed, "findings": [asdict(one) for one in findings]})
