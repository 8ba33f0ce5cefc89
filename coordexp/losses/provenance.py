"""What a stage-2 forward is for, and the names its numbers are logged under."""

from __future__ import annotations

from enum import Enum


class Forward(Enum):
    """Channel of a forward, and the provenance of its text atoms, coordinate atoms and diagnostics."""

    ANCHOR = ("A", "A1_text", None, "A1")
    """First of several channel-A forwards: teacher-forced, text only."""
    SELF_CONTEXT = ("A", "A2_text", "A2_coord", "A2")
    """Last of several channel-A forwards: coordinate slots saw their own expected embeddings."""
    TEACHER_FORCED = ("A", "A1_text", "A2_coord", "A1")
    """The only channel-A forward of a run with one iteration; coordinate atoms keep their A2 names."""
    ROLLOUT = ("B", "B_rollout_text", "B_coord", "B")
    """Channel B: the model's own prefix with the missed objects appended."""

    def __init__(self, channel: str, text: str, coord: str | None, diagnostics: str):
        self.channel = channel
        self.text = text
        self.coord = coord
        self.diagnostics = diagnostics
