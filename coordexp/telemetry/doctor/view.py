"""The live view of `coordexp doctor --watch`."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from coordexp.metrics import keys_rollout, keys_run, keys_stage1
from coordexp.metrics.catalog import EVAL_PREFIX
from coordexp.telemetry.doctor.diagnose import Diagnosis, Doctor
from coordexp.telemetry.rules.ranges import healthy_range, is_healthy

SHOWN = (
    keys_run.LOSS,
    keys_stage1.BASE_CE_LOSS,
    keys_stage1.COORD_DIAG_EXPECTED_BIN_MAE,
    keys_stage1.COORD_DIAG_COORD_VOCAB_MASS,
    keys_run.GRAD_NORM,
    keys_run.LEARNING_RATE,
    keys_run.TRAIN_TOKENS_PER_S,
    keys_run.TIME_SHARES["data"],
    keys_run.MEMORY_PEAK,
    keys_rollout.F1,
    keys_rollout.MATCHED_MASKIOU_MEAN,
    keys_rollout.PARSE_TRUNCATED_RATE,
    keys_rollout.DUPLICATE_RATE_MEAN,
    keys_run.EVAL_LOSS,
    *(EVAL_PREFIX + key for key in (keys_rollout.F1, keys_rollout.MAP, keys_rollout.PARSE_TRUNCATED_RATE)),
)
"""Numbers of the view, where the run has them."""


def watch(doctor: Doctor, *, every_s: float, console: Console | None = None) -> Diagnosis:
    """Show a run until it is over or the user breaks it off; the last diagnosis."""
    found = doctor.diagnose()
    with Live(render(found), console=console, auto_refresh=False) as live:
        try:
            while not found.is_over:
                time.sleep(every_s)
                found = doctor.diagnose()
                live.update(render(found), refresh=True)
        except KeyboardInterrupt:
            return found
    return found


def render(found: Diagnosis) -> Group:
    """One picture of a run: where it stands, its ranks, its numbers, what is wrong."""
    parts: list[Text | Table] = [Text(f"{found.run_dir}: {found.summary}", style="bold")]
    if found.ranks:
        parts.append(_ranks(found))
    if found.last:
        parts.append(_numbers(found))
    parts += [
        Text(f"{number}. {problem}", style="yellow") for number, problem in enumerate(found.problems, start=1)
    ]
    if not found.problems:
        parts.append(Text("No problem found.", style="green"))
    return Group(*parts)


def _ranks(found: Diagnosis) -> Table:
    table = Table("rank", "host", "process", "step", "doing", "said", "busy s/step", "end")
    for beat in found.ranks:
        end = "" if beat.end is None else f"{beat.end.how} {beat.end.reason}".strip()
        busy = "" if beat.busy_s is None else f"{beat.busy_s:.3g}"
        said = f"{found.now - beat.time:.0f} s ago"
        table.add_row(str(beat.rank), beat.host, str(beat.pid), str(beat.step), beat.doing, said, busy, end)
    return table


def _numbers(found: Diagnosis) -> Table:
    table = Table("number", "value", "healthy", "step")
    for payload in found.last:
        metrics: Mapping[str, float] = payload["metrics"]
        for key in SHOWN:
            if key in metrics:
                bad = is_healthy(key, metrics[key], payload["global_step"]) is False
                value = Text(f"{metrics[key]:.4g}", style="bold red" if bad else "")
                table.add_row(key, value, _range(key), str(payload["global_step"]))
    return table


def _range(key: str) -> str:
    entry = healthy_range(key)
    if entry is None:
        return ""
    low = "" if entry.low is None else f">= {entry.low:g}"
    high = "" if entry.high is None else f"<= {entry.high:g}"
    return " and ".join(part for part in (low, high) if part)
