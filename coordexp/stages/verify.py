"""Is the best checkpoint of a run what its log says? Loaded in a fresh process, complete, and scored again.

The fresh process is the run's own trainer on the checkpoint (`custom.evaluate_only`): its evaluation data, prompt,
decoding, matching and seeds, whatever number picks the best.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from coordexp.config.run.resolved import RESOLVED_FILE, flat_of_resolved
from coordexp.errors import EXIT_BAD_INPUT, ConfigError, CoordExpError
from coordexp.files import log_tail, read_json, write_json, write_text
from coordexp.metrics.best import BestMetric
from coordexp.metrics.sinks import METRICS_FILE, read_payloads
from coordexp.models.checkpoints import BEST_LINK, base_of, missing_files, step_of
from coordexp.stages import processes
from coordexp.stages.series import series_of

REPORT = "verify_best.json"
HF, VLLM = "hf", "vllm"
BACKENDS = (HF, VLLM)
TOLERANCE = 1e-4
_SECTIONS = ("custom", "training", "stage2_ab", "rollout_matching", "debug")
_NOT_THE_EVALUATION = frozenset(
    {
        "resume_from_checkpoint", "output_dir", "adapters", "model", "deepspeed", "report_to", "push_to_hub",
        "logging_dir", "load_best_model_at_end", "callbacks", "add_version", "create_checkpoint_symlink", "run_name",
    }
)  # fmt: skip
"""Arguments of a run that its evaluation does not depend on, and those that name the model."""


@dataclass(frozen=True)
class BestVerdict:
    """What was found of a run's best checkpoint.

    metric, step, logged: the number that picked it (None where the run logged none).  missing: files that it lacks.
    scored: backend -> the same number of the loaded checkpoint, None where it reported none.
    """

    checkpoint: str | None
    step: int | None
    metric: str
    logged: float | None
    missing: tuple[str, ...]
    scored: dict[str, float | None]
    tolerance: float

    @property
    def faults(self) -> list[str]:
        """What is wrong, one sentence each."""
        if self.checkpoint is None:
            return [
                f"no evaluation picked a best checkpoint by {self.metric}: there is no link `{BEST_LINK}`"
            ]
        found = [f"{self.checkpoint} lacks {what}" for what in self.missing]
        if self.logged is None:
            found.append(
                f"no record of step {self.step} has {self.metric}, so there is nothing to compare with"
            )
            return found
        for backend, score in self.scored.items():
            if score is None or not abs(score - self.logged) <= self.tolerance:
                said = "none" if score is None else f"{score:.6g}"
                found.append(
                    f"{self.metric} of step {self.step} was logged as {self.logged:.6g}; loaded again it is {said} by "
                    f"{backend} (tolerance {self.tolerance:g})"
                )
        return found

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        """As REPORT holds it."""
        return {**asdict(self), "missing": list(self.missing), "passed": self.passed, "faults": self.faults}


def settles(report: Mapping[str, Any], checkpoint: str) -> bool:
    """Whether an earlier report says all that a gate asks of a checkpoint; one made by hand may have been lenient."""
    is_strict = report.get("tolerance", math.inf) <= TOLERANCE
    return bool(report.get("checkpoint") == checkpoint and report.get("passed") and is_strict)


def verify_best(
    run: Path, *, backends: Sequence[str] = (HF,), tolerance: float = TOLERANCE, **process: Any
) -> BestVerdict:
    """Look at the best checkpoint of a run folder, and write what was found to REPORT in it.

    backends: that answer, where the number is one of answers.  process: `lock`, `environment` of `processes.train`.

    Raises:
        ConfigError: no run folder, a run that keeps no best checkpoint, or a backend that the number does not need.
        CoordExpError: the evaluation fails. With the end of its log.
    """
    resolved = read_resolved(run)
    metric = metric_of(run, resolved)
    link = run / BEST_LINK
    checkpoint = link.resolve() if link.is_dir() else None
    verdict = BestVerdict(None, None, metric.logged_as, None, (), {}, tolerance)
    if checkpoint is not None:
        step = step_of(checkpoint)
        logged = dict(series_of(read_payloads(run / METRICS_FILE), metric.logged_as)).get(step)
        missing = tuple(missing_files(checkpoint, resolved))
        if logged is not None and not math.isfinite(logged):
            logged = None
        scored = {}
        if not missing and logged is not None:
            for backend in backends:
                numbers = _evaluate(checkpoint, step, resolved, backend, process)
                scored[backend] = numbers.get(metric.logged_as)
        verdict = BestVerdict(checkpoint.name, step, metric.logged_as, logged, missing, scored, tolerance)
    write_json(run / REPORT, verdict.to_json())
    return verdict


def read_resolved(run: Path) -> dict[str, Any]:
    """resolved_config.json of a run folder; ConfigError where it is none."""
    path = run / RESOLVED_FILE
    if not path.is_file():
        raise ConfigError(f"{run}: no {RESOLVED_FILE} there; expected the output folder of a run.")
    found = read_json(path, error=ConfigError)
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: holds a {type(found).__name__}; expected a mapping.")
    return found


def keeps_best(resolved: Mapping[str, Any]) -> bool:
    """Whether a run was one whose evaluations pick a best checkpoint that is saved."""
    return "metric_for_best_model" in resolved.get("derived", {})


def metric_of(run: Path, resolved: Mapping[str, Any]) -> BestMetric:
    """The number that picks the best checkpoint of a run; ConfigError where none does."""
    if not keeps_best(resolved):
        raise ConfigError(
            f"{run}: the run keeps no best checkpoint; it has no evaluation, or saves nothing (eval_strategy, "
            "save_strategy)."
        )
    derived = resolved["derived"]
    return BestMetric(derived["metric_for_best_model"], derived["greater_is_better"])


def _evaluate(
    checkpoint: Path, step: int, resolved: Mapping[str, Any], backend: str, process: Mapping[str, Any]
) -> dict[str, float]:
    """The numbers of an evaluation of `checkpoint` in a fresh process."""
    with tempfile.TemporaryDirectory(prefix="coordexp_verify_") as scratch:
        folder, run_file, log = Path(scratch) / "run", Path(scratch) / "run.yaml", Path(scratch) / "log.txt"
        settings = evaluation_of(resolved, checkpoint, step, backend, folder)
        write_text(run_file, yaml.safe_dump(settings, allow_unicode=True, sort_keys=False))
        code = processes.train(run_file, (), log, one_process=True, **process)
        if code != 0:
            kind = ConfigError if code == EXIT_BAD_INPUT else CoordExpError
            raise kind(
                f"{checkpoint} could not be evaluated with {backend} (exit status {code}); the log ends\n"
                f"{log_tail(log, 15)}"
            )
        found: dict[str, float] = {}
        for payload in read_payloads(folder / METRICS_FILE):
            found |= payload["metrics"] if payload["mode"] == "eval" else {}
        return found


def evaluation_of(
    resolved: Mapping[str, Any], checkpoint: Path, step: int, backend: str, output: Path
) -> dict[str, Any]:
    """A run file in the flat form that only evaluates `checkpoint`, as the run of `resolved` would after `step`.

    Raises ConfigError for a backend where the run's evaluation asks the model nothing.
    """
    flat = flat_of_resolved(resolved, _SECTIONS, without=_NOT_THE_EVALUATION)
    ours = {name: dict(section) for name, section in flat["coordexp"].items()}
    ours.setdefault("custom", {})
    asking = ours.get("rollout_matching")
    if asking is None and ours["custom"].get("rollout_eval", {}).get("enabled"):
        asking = ours["custom"]["rollout_eval"] = dict(ours["custom"]["rollout_eval"])
    if asking is not None:
        _answer_with(asking, backend)
    elif backend != HF:
        raise ConfigError(
            f"--backend {backend}: the run is judged by its loss and asks the model nothing; leave --backend out."
        )
    ours["custom"]["evaluate_only"] = step
    base = base_of(checkpoint)
    model = {"model": str(checkpoint)} if base is None else {"model": base, "adapters": [str(checkpoint)]}
    return {
        **flat, **model, "coordexp": ours, "output_dir": str(output), "add_version": False, "report_to": ["none"],
        "push_to_hub": False,
    }  # fmt: skip


def _answer_with(asking: dict[str, Any], backend: str) -> None:
    """Let the rollouts of an evaluation come from `backend` in this process."""
    asking["backend"] = backend
    asking.pop("offload", None)  # there is no training state
    engine = asking.pop("vllm", {})
    if backend == VLLM:
        asking["vllm"] = {**engine, "mode": "colocate", "server": None}
