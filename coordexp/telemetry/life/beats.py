"""`ranks/rank_N.json` of a run folder: where each process stands, and how it ended. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from coordexp.errors import RecordError
from coordexp.files import read_json

FOLDER = "ranks"
TRAINED, STOPPED, FAILED = "trained", "stopped", "failed"
"""How a process ended: it came to the end of training, a rule stopped it, or it broke off."""


@dataclass(frozen=True, slots=True)
class RankEnd:
    """how: `TRAINED`, `STOPPED` or `FAILED`.  reason: one line.  stack: of the main thread where it broke off."""

    how: str
    reason: str = ""
    stack: str = ""


@dataclass(frozen=True, slots=True)
class RankBeat:
    """What one process said last.

    step: optimizer steps that are done.  doing: `starting`, `training`, ...  time, step_time: seconds since the epoch
    of this writing, and of the end of the last step.  busy_s: seconds of a step in which it did not wait for other
    ranks, over the last log window; None before one.  rules: findings at the last record, on the rank that judges.
    end: None while it runs.
    """

    rank: int
    world_size: int
    host: str
    pid: int
    step: int
    doing: str
    time: float
    step_time: float
    busy_s: float | None = None
    rules: tuple[Mapping[str, Any], ...] = ()
    end: RankEnd | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "rules": [dict(rule) for rule in self.rules]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RankBeat:
        """From what `to_json` gave."""
        known = {name: content[name] for name in (entry.name for entry in fields(cls)) if name in content}
        end = known.get("end")
        return cls(
            **{
                **known,
                "rules": tuple(known.get("rules", ())),
                "end": None if end is None else RankEnd(**end),
            }
        )


def beat_file(run_dir: Path, rank: int) -> Path:
    """Where a rank writes."""
    return run_dir / FOLDER / f"rank_{rank}.json"


def read_beats(run_dir: Path) -> list[RankBeat]:
    """What every rank of a run said last, by rank; files that cannot be read are left out."""
    found = []
    for path in (run_dir / FOLDER).glob("rank_*.json"):
        try:
            found.append(RankBeat.from_json(read_json(path)))
        except (RecordError, KeyError, TypeError, AttributeError):
            continue
    return sorted(found, key=lambda beat: beat.rank)
