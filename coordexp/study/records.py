"""The files in a cell's folder that say how far it is, and what it cost.

`training.json`     what the training there is of (its identity), written when it begins and again when it is over
`attempts.jsonl`    a line when a process begins and one when it ends: seconds, CPU seconds, exit code
`cell.json`         written last: numbers and cost, or how it failed
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coordexp.errors import ConfigError
from coordexp.files import read_json, read_jsonl, write_json
from coordexp.metrics.keys_run import TIME_STEP, TRAIN_RUNTIME, TRAIN_TOKENS_SEEN
from coordexp.metrics.sinks import METRICS_FILE, read_payloads
from coordexp.models.checkpoints import checkpoints_of, is_whole, step_of
from coordexp.study.schema import BEST, LAST, Checkpoint

TRAINING, ATTEMPTS, CELL = "training.json", "attempts.jsonl", "cell.json"
DONE, FAILED = "done", "failed"


def identity_of(made_from: Mapping[str, Any]) -> str:
    """A short hash of JSON values, whatever the order of their keys."""
    text = json.dumps(made_from, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_record(folder: Path, name: str) -> dict[str, Any] | None:
    """A JSON file of a cell's folder, None where it is not there."""
    path = folder / name
    if not path.is_file():
        return None
    record: dict[str, Any] = read_json(path)
    return record


def begin_training(folder: Path, identity: str, made_from: Mapping[str, Any], *, keep: bool) -> None:
    """Note what is trained here; without `keep` what stood here before is removed."""
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / TRAINING, {"identity": identity, "finished": False, "made_from": dict(made_from)})


def finish_training(folder: Path) -> None:
    """Note that it is over."""
    record = read_json(folder / TRAINING)
    write_json(folder / TRAINING, {**record, "finished": True})


def checkpoints(folder: Path) -> dict[int, Path]:
    """Step -> folder of every whole checkpoint, ascending."""
    return {step_of(path): path for path in checkpoints_of(folder) if is_whole(path)}


def chosen_checkpoint(folder: Path, which: Checkpoint) -> Path:
    """The checkpoint folder that a study names; ConfigError saying which there are."""
    found = checkpoints(folder)
    if which == BEST:
        link = folder / BEST
        if link.is_dir():
            return folder / link.resolve().name
    elif which == LAST:
        if found:
            return found[max(found)]
    elif which in found:
        return found[which]
    listed = ", ".join(path.name for path in found.values()) or "none"
    raise ConfigError(f"{folder} holds no checkpoint {which}; found {listed}.")


def training_numbers(folder: Path) -> dict[str, float | None]:
    """train_s: seconds of all optimizer steps, without start, evaluations and saves; tokens_trained: those with a loss.

    Steps that a resumed run did again count once. None where the run keeps no such records.
    """
    if not (folder / METRICS_FILE).is_file():
        return {"train_s": _runtime(folder), "tokens_trained": None}
    of_step: dict[int, Mapping[str, float]] = {}
    for payload in read_payloads(folder / METRICS_FILE):
        if TIME_STEP in payload["metrics"]:
            of_step[payload["global_step"]] = payload["metrics"]
    seconds, before = 0.0, 0
    for step in sorted(of_step):
        seconds += of_step[step][TIME_STEP] * (step - before)
        before = step
    tokens = of_step[before].get(TRAIN_TOKENS_SEEN) if of_step else None
    return {"train_s": seconds if of_step else _runtime(folder), "tokens_trained": tokens}


def process_costs(folder: Path) -> dict[str, dict[str, float | int | bool]]:
    """Phase ("train", "evaluate") -> seconds and CPU seconds of its processes, and whether all were seen to end.

    A process that was killed together with the study leaves no line behind: its cost is not in the sums.
    cpu_share: CPU seconds over seconds of the last one that came to its end; absent without such a one.
    """
    costs: dict[str, dict[str, float | int | bool]] = {}
    if not (folder / ATTEMPTS).is_file():
        return costs
    begun: dict[str, int] = {}
    for _, line in read_jsonl(folder / ATTEMPTS, skip_broken=True):
        phase = line["phase"]
        cost = costs.setdefault(phase, {"wall_s": 0.0, "cpu_s": 0.0, "processes": 0})
        if line["event"] == "begin":
            begun[phase] = begun.get(phase, 0) + 1
            continue
        cost["wall_s"] += line["wall_s"]
        cost["cpu_s"] += line["cpu_s"]
        if line["exit_code"] == 0 and line["wall_s"]:
            cost["cpu_share"] = line["cpu_s"] / line["wall_s"]
        cost["processes"] += line["exit_code"] >= 0  # of one that was ended, what it had started is missing
    for phase, cost in costs.items():
        cost["is_whole"] = cost["processes"] == begun.get(phase, 0)
    return costs


def _runtime(folder: Path) -> float | None:
    """What the HF Trainer says of a run without our records."""
    log = folder / "logging.jsonl"
    if not log.is_file():
        return None
    found = [line[TRAIN_RUNTIME] for _, line in read_jsonl(log, skip_broken=True) if TRAIN_RUNTIME in line]
    return float(found[-1]) if found else None
