"""What the files of a run say about it: is it alive, is its best checkpoint there, are its numbers healthy?"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordexp.config.run.advice import advice
from coordexp.config.run.resolved import RESOLVED_FILE
from coordexp.errors import ConfigError, RecordError
from coordexp.files import read_json
from coordexp.metrics import keys_run
from coordexp.metrics.best import BestMetric, why_not_best
from coordexp.metrics.payload import Payload
from coordexp.metrics.sinks import METRICS_FILE, STATS_FILE, read_payloads
from coordexp.telemetry.health import HealthWatch

STALE_AFTER_S = 600.0
"""A run whose last number is older has stopped, unless it logs less often than that."""
RECENT_WINDOWS = 3
"""Training windows whose advice is reported, beside that of the last evaluation."""
_COUNTED = {
    keys_run.NONFINITE_METRICS_TOTAL: "the console names the keys; lower the learning rate, check max_grad_norm and "
    "the precision",
    keys_run.NONFINITE_LOSS_TOTAL: "the console names the samples; lower the learning rate, check max_grad_norm and "
    "the precision",
    keys_run.SAMPLES_REPLACED_TOTAL: "set strict: true, and the first sample that cannot be encoded is named with its "
    "file and line; raise global_max_length or mend the records",
}
"""Counts that should be 0 over a whole run, and what to do about them."""
_AUDIT_HELPS = ("parse_drop", "no_prediction", "excluded", "closure_drop", "gating", "f1_fell")
"""Advice whose cause may be that two places disagree, which nobody sees in a number."""
_AUDITED = "prompts, pixels, targets and weights agree everywhere"
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "global_step*")


@dataclass
class Diagnosis:
    """summary: what the run is and where it stands.  problems: what is wrong and what to do, one sentence each."""

    summary: str
    problems: list[str] = field(default_factory=list)


def diagnose(run_dir: Path, *, now: float | None = None) -> Diagnosis:
    """Read a run folder.

    now: seconds since the epoch; None takes the clock.
    Raises ConfigError for a folder without the files of a run, ContractError for a broken metrics file.
    """
    resolved = _read_resolved(run_dir)
    metrics_file = run_dir / METRICS_FILE
    payloads = list(read_payloads(metrics_file)) if metrics_file.exists() else []
    total_steps = resolved.get("derived", {}).get("total_steps")
    if not payloads:
        diagnosis = Diagnosis(_summary(resolved, 0, total_steps))
        diagnosis.problems.append(
            "the run has logged nothing. What to do: look at its console output; it stopped before the first log, or "
            "has just started."
        )
        return diagnosis
    step = max(payload["global_step"] for payload in payloads)
    age = (time.time() if now is None else now) - metrics_file.stat().st_mtime
    is_finished = _is_finished(payloads, step, total_steps)
    state = "finished" if is_finished else f"last number {_duration(age)} ago"
    return Diagnosis(
        f"{_summary(resolved, step, total_steps)}, {state}",
        [
            *([] if is_finished else _stopped(payloads, age)),
            *_stats_behind(run_dir / STATS_FILE, payloads[-1]),
            *_best_checkpoint(run_dir, resolved.get("derived", {}), payloads, is_finished),
            *_counted(payloads),
            *_unhealthy(payloads, _audit_command(run_dir, resolved)),
            *_advice(resolved),
        ],
    )


def _advice(resolved: Mapping[str, Any]) -> list[str]:
    """What the settings leave untrained."""
    swift, offset = resolved.get("swift", {}), resolved.get("custom", {}).get("coord_offset", {})
    return advice(swift, coord_offset=bool(offset.get("enabled"))) if "tuner_type" in swift else []


def _read_resolved(run_dir: Path) -> dict[str, Any]:
    path = run_dir / RESOLVED_FILE
    if not path.is_file():
        below = sorted(str(found.parent) for found in run_dir.glob(f"*/{RESOLVED_FILE}"))
        hint = f" Runs below it: {', '.join(below)}." if below else ""
        raise ConfigError(f"{run_dir}: no {RESOLVED_FILE} there; expected the output folder of a run.{hint}")
    resolved = read_json(path, error=ConfigError)
    if not isinstance(resolved, dict):
        raise ConfigError(f"{path}: holds a {type(resolved).__name__}; expected a mapping.")
    return resolved


def _summary(resolved: Mapping[str, Any], step: int, total_steps: int | None) -> str:
    of = "" if total_steps is None else f" of {total_steps}"
    variant = resolved.get("trainer_variant", "unknown variant")
    return f"{variant}, config {str(resolved.get('config_hash', 'unknown'))[:12]}, step {step}{of}"


def _is_finished(payloads: Sequence[Payload], step: int, total_steps: int | None) -> bool:
    return keys_run.TRAIN_RUNTIME in payloads[-1]["metrics"] or (
        total_steps is not None and step >= total_steps
    )


def _stopped(payloads: Sequence[Payload], age: float) -> list[str]:
    """Older than STALE_AFTER_S and than five of its usual intervals between logs."""
    train = [payload for payload in payloads if payload["mode"] == "train"]
    interval = 0.0
    if len(train) > 1:
        num_steps = train[-1]["global_step"] - train[-2]["global_step"]
        interval = num_steps * float(train[-1]["metrics"].get(keys_run.TRAIN_SPEED, 0.0))
    if age <= max(STALE_AFTER_S, 5 * interval):
        return []
    return [
        f"the run has stopped: its last number is {_duration(age)} old. What to do: look at the end of its console "
        "output; if the process is gone, resume with --resume_from_checkpoint and the newest checkpoint; if it is "
        "there, it hangs (see runbooks/when_it_breaks.md)."
    ]


def _stats_behind(path: Path, last: Payload) -> list[str]:
    try:
        step = read_json(path)["global_step"] if path.exists() else None
    except (RecordError, KeyError, TypeError):
        step = None
    if step is not None and step >= last["global_step"]:
        return []
    found = "is missing or broken" if step is None else f"is at step {step}"
    return [
        f"{path.name} {found}, {METRICS_FILE} at step {last['global_step']}: a write failed. What to do: check the "
        "free space and the permissions of the folder."
    ]


def _best_checkpoint(
    run_dir: Path, derived: Mapping[str, Any], payloads: Sequence[Payload], is_finished: bool
) -> list[str]:
    """The checkpoint of the best evaluation, by the run's own choice of metric and direction, has weights."""
    if "metric_for_best_model" not in derived:
        return []  # no evaluation, or nothing is saved
    metric = BestMetric(derived["metric_for_best_model"], derived["greater_is_better"])
    key, greater = metric.logged_as, metric.greater_is_better
    scores = {
        p["global_step"]: float(p["metrics"][key])
        for p in payloads
        if why_not_best(metric, p["metrics"]) is None
    }
    if not scores:
        return (
            [
                f"no evaluation could pick the best checkpoint by {key}: it was not logged, or the model predicted no "
                "object. What to do: check eval_strategy, and look at what the model writes."
            ]
            if is_finished
            else []
        )
    best_step = (max if greater else min)(scores, key=lambda step: scores[step])
    if not is_finished and best_step == payloads[-1]["global_step"]:
        return []  # it may be on its way to the disk
    checkpoint = run_dir / f"checkpoint-{best_step}"
    if any(file for pattern in _WEIGHTS for file in checkpoint.glob(pattern)):
        return []
    kept = sorted((path.name for path in run_dir.glob("checkpoint-*")), key=lambda name: (len(name), name))
    return [
        f"the best evaluation ({key} = {scores[best_step]:.4f} at step {best_step}) has no checkpoint: "
        f"{checkpoint.name} is missing or holds no weights; kept: {', '.join(kept) or 'none'}. What to do: let "
        "save_steps divide eval_steps so that every evaluated step can be kept, and delete no checkpoint by hand."
    ]


def _counted(payloads: Sequence[Payload]) -> list[str]:
    problems = []
    for key, action in _COUNTED.items():
        by_step = {p["global_step"]: p["metrics"][key] for p in payloads if p["metrics"].get(key)}
        if by_step:
            problems.append(
                f"{key}: {sum(by_step.values()):g} over the run, first at step {min(by_step)}, last at step "
                f"{max(by_step)}. What to do: {action}."
            )
    return problems


def _audit_command(run_dir: Path, resolved: Mapping[str, Any]) -> str:
    """The audit of the run's newest checkpoint on what it is trained on."""
    checkpoints = [path for path in run_dir.glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    newest = max(checkpoints, key=lambda path: int(path.name.partition("-")[2]), default=None)
    data = resolved.get("swift", {}).get("dataset") or ["TRAIN.jsonl"]
    name = data if isinstance(data, str) else data[0]
    return f"coordexp audit {'RUN_FILE' if newest is None else newest} {name}"


def _unhealthy(payloads: Sequence[Payload], audit: str) -> list[str]:
    """Advice on the last windows and the last evaluation, the newest of each kind.

    audit: the command that tells whether prompts, targets and weights are what they seem.
    """
    train = [index for index, payload in enumerate(payloads) if payload["mode"] == "train"]
    evals = [index for index, payload in enumerate(payloads) if payload["mode"] == "eval"]
    recent = {*train[-RECENT_WINDOWS:], *evals[-1:]}
    watch = HealthWatch()
    newest: dict[tuple[str, str], str] = {}
    for index, payload in enumerate(payloads):
        numbers = {
            key: value for key, value in payload["metrics"].items() if not key.endswith(tuple(_COUNTED))
        }
        found = watch.look(numbers)
        if index in recent:
            for one in found:
                hint = f" `{audit}` tells whether {_AUDITED}." if one.kind in _AUDIT_HELPS else ""
                newest[one.kind, one.key] = f"step {payload['global_step']}: {one.message}{hint}"
    return list(newest.values())


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
