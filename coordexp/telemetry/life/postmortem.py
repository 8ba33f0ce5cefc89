"""`postmortem.json` of a run folder: what is known of a run that ended badly. No torch.

Any rank writes it from the files of the folder, the last one to end with what all have said.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import orjson

from coordexp.errors import ContractError
from coordexp.files import write_json
from coordexp.metrics.payload import Payload, validate_payload
from coordexp.metrics.sinks import METRICS_FILE
from coordexp.telemetry.life.beats import FAILED, read_beats

POSTMORTEM_FILE = "postmortem.json"
EARLIER_FILE = "postmortem_before.json"
"""That of the attempt before."""
LAST_PAYLOADS = 5
_TAIL_BYTES = 1 << 18


def write_postmortem(run_dir: Path) -> Path | None:
    """Write it and return where; None where no rank has broken off."""
    ranks = read_beats(run_dir)
    broken = sorted(
        (beat for beat in ranks if beat.end and beat.end.how == FAILED), key=lambda beat: beat.time
    )
    if not broken:
        return None
    first = broken[0]
    assert first.end is not None
    content: dict[str, Any] = {
        "written": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "step": max(beat.step for beat in ranks),
        "rank": first.rank,
        "reason": first.end.reason,
        "stack": first.end.stack.splitlines(),
        "rules": [dict(rule) for beat in ranks for rule in beat.rules],
        "last_payloads": last_payloads(run_dir / METRICS_FILE),
        "ranks": [beat.to_json() for beat in ranks],
    }
    path = run_dir / POSTMORTEM_FILE
    write_json(path, content, sync=False)
    return path


def set_aside_postmortem(run_dir: Path) -> None:
    """A new attempt begins: what is there is of the one before."""
    path = run_dir / POSTMORTEM_FILE
    if path.exists():
        path.replace(run_dir / EARLIER_FILE)


def last_payloads(path: Path, number: int = LAST_PAYLOADS) -> list[Payload]:
    """The last payloads of a metrics.jsonl, without reading all of it; none where there is no such file."""
    if not path.exists():
        return []
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = stream.read().splitlines()
    found: list[Payload] = []
    for line in lines:
        try:
            found.append(validate_payload(orjson.loads(line)))
        except (orjson.JSONDecodeError, ContractError):
            continue  # half a line, or the record that a run begins with
    return found[-number:]
