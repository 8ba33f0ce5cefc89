"""Checking data sets: their boxes, their names, every one of their pictures, and each against the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coordexp.data.check.boxes import box_findings
from coordexp.data.check.findings import MAX_EXAMPLES, Finding, Level, numbered
from coordexp.data.check.names import name_findings
from coordexp.data.check.picture_findings import (
    Reports,
    leakage_findings,
    missing_findings,
    picture_findings,
)
from coordexp.data.check.pictures import OnPicture, look_at_all, no_progress
from coordexp.data.check.source import Source
from coordexp.files import is_file


@dataclass(frozen=True)
class CheckReport:
    """What was found: of every source, and between them.

    findings: one list per source, errors first.  shared: about several sources.
    """

    sources: Sequence[Source]
    findings: Sequence[Sequence[Finding]]
    shared: Sequence[Finding]

    def count(self, level: Level) -> int:
        """How many findings there are of a level."""
        return sum(finding.level is level for found in (*self.findings, self.shared) for finding in found)


def check_sources(sources: Sequence[Source], *, on_picture: OnPicture = no_progress) -> CheckReport:
    """Look at everything. on_picture: called with the pictures just looked at, and those in all."""
    paths = [path for source in sources for path in source.pictures if path is not None and is_file(path)]
    reports = look_at_all(paths, on_done=on_picture)
    return CheckReport(
        sources, [_findings(source, reports) for source in sources], leakage_findings(sources, reports)
    )


def _findings(source: Source, reports: Reports) -> list[Finding]:
    found = [
        *_faults(source),
        *box_findings(source.dataset),
        *missing_findings(source),
        *picture_findings(source, reports),
        *name_findings(source.dataset),
        *source.findings,
        *_left_out(source),
    ]
    return sorted(found, key=lambda finding: list(Level).index(finding.level))


def _faults(source: Source) -> list[Finding]:
    if not source.faults:
        return []
    examples = tuple(fault.rstrip(".") for fault in source.faults[:MAX_EXAMPLES])
    message = numbered("{count} [entry|entries] cannot be read", len(source.faults))
    return [Finding(Level.ERROR, "unreadable_entries", message, len(source.faults), examples)]


def _left_out(source: Source) -> list[Finding]:
    return [
        Finding(Level.NOTE, kind, f"{count} {kind.replace('_', ' ')}", count)
        for kind, count in source.left_out.items()
        if count
    ]
