"""What a migration says about the keys of a file."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from coordexp.config.checks.problems import Place


class NoteKind(Enum):
    """Title of a part of the report."""

    DEFAULT = "Defaults of the research code that differ from ours, written out"
    RENAMED = "Renamed"
    CHANGED = "Changed"
    DROPPED = "Dropped, as nothing depends on them here"
    LOOK = "Look at these yourself"
    LOST = "Cannot be carried over"

    @property
    def word(self) -> str:
        """In a count: "3 renamed"."""
        return {"DEFAULT": "defaults written out", "LOOK": "to look at", "LOST": "lost"}.get(
            self.name, self.name.lower()
        )


@dataclass(frozen=True)
class Note:
    """path: of the old key, or of the new one where a default is written out.  place: of the old key."""

    kind: NoteKind
    path: str
    text: str
    place: Place | None = None

    def __str__(self) -> str:
        where = "" if self.place is None else f" ({self.place})"
        return f"{self.path}{where}: {self.text}"
