"""What a controller decided, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DEADBAND, AUDIT, WIN, TAX_ONLY, CONFIDENCE = "DB", "AUDIT", "WIN", "TAX ONLY", "CONFIDENCE+"
"""Labels: inside the deadband; the window ran the base value; the knob bought something; it bought nothing; a gain
with less entropy."""


def flags_of(labels: Sequence[str]) -> dict[str, float]:
    """Labels as numbers; `won` and `surer` only where something was judged."""
    flags = {"deadband": float(DEADBAND in labels), "audit": float(AUDIT in labels)}
    if WIN in labels or TAX_ONLY in labels:
        flags["won"] = float(WIN in labels)
        flags["surer"] = float(CONFIDENCE in labels)
    return flags


@dataclass(frozen=True)
class Decision:
    """One update of a controller.

    before, after: value of the knob (in mode `recommend`, after is what it would become).
    in_force: what the steps until the next update run.
    numbers: what the metrics say of it, by short names.
    """

    controller: str
    knob: str
    mode: str
    before: float
    after: float
    in_force: float
    reason: str
    labels: tuple[str, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)

    def record(self, step: int) -> dict[str, Any]:
        """As a line of control.jsonl. step: optimizer steps that were done when it was made."""
        return {"step": step, **vars(self), "labels": list(self.labels), "numbers": dict(self.numbers)}

    @property
    def label(self) -> str:
        """The labels as people read them: `[AUDIT][WIN]`."""
        return "".join(f"[{label}]" for label in self.labels)
