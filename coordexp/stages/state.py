"""What is kept of a stage between two calls of `coordexp run`: what its folder was made from, and its verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coordexp.config import RunConfig, config_hash
from coordexp.control.acceptance import VERDICT_FILE, Judgement, Outcome
from coordexp.errors import ConfigError
from coordexp.files import read_json, write_json
from coordexp.inference.fingerprint import file_fingerprint, model_fingerprint
from coordexp.metrics.keys_run import TRAIN_RUNTIME
from coordexp.metrics.payload import Payload
from coordexp.metrics.sinks import METRICS_FILE, read_payloads
from coordexp.models.checkpoints import is_final, last_whole
from coordexp.stages.plan import PlannedStage

STAMP = "stage.json"
"""Written into a stage's folder before its training starts."""
ENDED = "ended.json"
"""Written into it when its training ended well."""
NOT_RUN = "not_run"


def made_from(stage: PlannedStage, start: Path | None, config: RunConfig) -> dict[str, Any]:
    """What decides the numbers of a stage: its settings, its data, and the weights that it starts from.

    config: the run with its start.  start: the checkpoint of an earlier stage; None for the model of the run file.
    """
    swift = stage.config.swift
    model = Path(str(swift.get("model"))) if start is None else start
    data = [*_listed(swift.get("dataset")), *_listed(swift.get("val_dataset"))]
    return {
        "settings": config_hash(config.variant, config.sections, config.swift, without_defaults=True),
        "seed": swift.get("seed"),
        "start": model_fingerprint(model) if model.is_dir() else str(model),
        "data": {path: file_fingerprint(Path(path)) for path in data if Path(path).is_file()},
    }


def differences(stage: PlannedStage, wanted: Mapping[str, Any]) -> list[str] | None:
    """In what the folder of a stage was made from something else; None where it holds nothing yet."""
    path = stage.output / STAMP
    if not path.is_file():
        left = stage.output.iterdir() if stage.output.is_dir() else ()
        if any(not one.name.startswith(".") for one in left):  # hidden: a write that did not come to its end
            raise ConfigError(
                f"{stage.output}: holds something that no `coordexp run` made (no {STAMP}). Choose another output_dir, "
                "or move it away."
            )
        return None
    found = read_json(path, error=ConfigError)
    return sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))


def write_stamp(stage: PlannedStage, wanted: Mapping[str, Any]) -> None:
    """Say what the folder of a stage is made from."""
    write_json(stage.output / STAMP, wanted)


def payloads_of(stage: PlannedStage) -> list[Payload]:
    """All records of a stage so far."""
    path = stage.output / METRICS_FILE
    return list(read_payloads(path)) if path.is_file() else []


def note_end(stage: PlannedStage) -> None:
    """Say that the training of a stage ended well, also where that was before its last step."""
    write_json(stage.output / ENDED, {"stage": stage.name})


def is_trained(stage: PlannedStage, payloads: Sequence[Payload]) -> bool:
    """Whether the training of a stage came to its end: it was noted, or its last step is evaluated and saved.

    A run that a rule ended is not: it goes on from its checkpoint.
    """
    if (stage.output / ENDED).is_file():
        return True
    last = last_whole(stage.output)
    if last is not None:
        return is_final(last)
    return bool(payloads) and TRAIN_RUNTIME in payloads[-1]["metrics"]  # nothing is saved


def judgements_json(judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """One entry per criterion."""
    return [
        {**asdict(one.criterion), "text": str(one.criterion), "passed": one.passed, "reason": one.reason}
        | {"found": one.found, "step": one.step}
        for one in judgements
    ]


def write_verdict(folder: Path, verdict: Mapping[str, Any]) -> None:
    """Make `verdict` the content of the folder's verdict file."""
    write_json(folder / VERDICT_FILE, verdict)


def stage_verdict(
    stage: PlannedStage,
    found: Outcome,
    judgements: Sequence[Judgement],
    *,
    last_step: int,
    best: str | None,
    last: str | None,
    verified: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The content of a stage's verdict file. verified: what `verify-best` found, None where it was not asked."""
    return {
        "stage": stage.name,
        "run": str(stage.run),
        "outcome": str(found),
        "accepted": found.goes_on,
        "last_step": last_step,
        "best": best,
        "last": last,
        "criteria": judgements_json(judgements),
        "verified": None if verified is None else dict(verified),
    }


def _listed(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [str(item) for item in values]
