"""Is the checkpoint of the best evaluation where it should be? And which one is the newest?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coordexp.metrics.best import BestMetric, why_not_best
from coordexp.metrics.payload import Payload

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "global_step*")


def best_checkpoint(
    run_dir: Path,
    derived: Mapping[str, Any],
    evaluations: Sequence[Payload],
    *,
    is_finished: bool,
    evaluated_last: bool,
) -> str | None:
    """What is wrong with the checkpoint of the best evaluation, by the run's own choice of metric and direction.

    evaluated_last: whether the last record is an evaluation.
    """
    if "metric_for_best_model" not in derived:
        return None  # no evaluation, or nothing is saved
    metric = BestMetric(derived["metric_for_best_model"], derived["greater_is_better"])
    key, greater = metric.logged_as, metric.greater_is_better
    scores = {
        p["global_step"]: float(p["metrics"][key])
        for p in evaluations
        if why_not_best(metric, p["metrics"]) is None
    }
    if not scores:
        if not is_finished:
            return None
        return (
            f"no evaluation could pick the best checkpoint by {key}: it was not logged, or the model predicted no "
            "object. What to do: check eval_strategy, and look at what the model writes."
        )
    best_step = (max if greater else min)(scores, key=lambda step: scores[step])
    if not is_finished and evaluated_last and best_step == evaluations[-1]["global_step"]:
        return None  # it may be on its way to the disk
    checkpoint = run_dir / f"checkpoint-{best_step}"
    if any(file for pattern in _WEIGHTS for file in checkpoint.glob(pattern)):
        return None
    kept = sorted((path.name for path in run_dir.glob("checkpoint-*")), key=lambda name: (len(name), name))
    return (
        f"the best evaluation ({key} = {scores[best_step]:.4f} at step {best_step}) has no checkpoint: "
        f"{checkpoint.name} is missing or holds no weights; kept: {', '.join(kept) or 'none'}. What to do: let "
        "save_steps divide eval_steps so that every evaluated step can be kept, and delete no checkpoint by hand."
    )


def audit_command(run_dir: Path, resolved: Mapping[str, Any]) -> str:
    """The audit of the run's newest checkpoint on what it is trained on."""
    checkpoints = [path for path in run_dir.glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    newest = max(checkpoints, key=lambda path: int(path.name.partition("-")[2]), default=None)
    data = resolved.get("swift", {}).get("dataset") or ["TRAIN.jsonl"]
    name = data if isinstance(data, str) else data[0]
    return f"coordexp audit {'RUN_FILE' if newest is None else newest} {name}"
