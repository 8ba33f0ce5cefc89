"""What the files of a run say about it: is it alive, is its best checkpoint there, are its numbers healthy?

doctor = Doctor(run_dir)
doctor.diagnose()          # as often as you like: it reads what is new
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordexp.config.run.advice import advice
from coordexp.config.run.resolved import RESOLVED_FILE
from coordexp.errors import RecordError
from coordexp.files import read_json
from coordexp.metrics import keys_run
from coordexp.metrics.payload import Payload
from coordexp.metrics.sinks import METRICS_FILE, STATS_FILE
from coordexp.telemetry.doctor.checkpoints import audit_command, best_checkpoint
from coordexp.telemetry.doctor.files import RunFiles
from coordexp.telemetry.doctor.history import RunHistory
from coordexp.telemetry.life import ranks
from coordexp.telemetry.life.beats import FAILED, STOPPED, RankBeat
from coordexp.telemetry.life.postmortem import POSTMORTEM_FILE
from coordexp.telemetry.rules.table import RULES
from coordexp.telemetry.rules.watch import RuleFinding

STALE_AFTER_S = 600.0
"""A run whose last number is older has stopped, unless it logs less often than that."""
_COUNTED = {
    rule.keys[0]: rule
    for rule in RULES
    if rule.name in ("nonfinite_metric", "nonfinite_loss", "samples_replaced", "oom_retries", "types_skipped")
}
"""Counts that should be 0 over a whole run, with the rule that says what to do about them."""
_AUDITED = "prompts, pixels, targets and weights agree everywhere"


@dataclass(frozen=True)
class Complaint:
    """One thing that is wrong.

    kind: `rule`, `rank`, `file`, `checkpoint`, `count` or `setting`.  text: what, and what to do.  finding: of a rule.
    """

    kind: str
    text: str
    finding: RuleFinding | None = None

    def __str__(self) -> str:
        return self.text

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        found = {} if self.finding is None else self.finding.to_json()
        return {"kind": self.kind, **found, "message": self.text}


@dataclass(frozen=True)
class Diagnosis:
    """state: `starting`, `running`, `finished`, `stopped by ...`, `broken off`, `silent`.  summary: what the run is and
    where it stands.  ranks: what each said last.  last: newest record of each mode.
    """

    run_dir: Path
    state: str
    summary: str
    step: int
    total_steps: int | None
    problems: tuple[Complaint, ...]
    ranks: tuple[RankBeat, ...]
    missing: tuple[str, ...]
    last: tuple[Payload, ...]
    now: float

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to come."""
        return self.state not in ("starting", "running")

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "run": str(self.run_dir),
            "state": self.state,
            "summary": self.summary,
            "step": self.step,
            "total_steps": self.total_steps,
            "problems": [problem.to_json() for problem in self.problems],
            "missing_files": list(self.missing),
            "ranks": [{**beat.to_json(), "silent_s": self.now - beat.time} for beat in self.ranks],
            "last": {payload["mode"]: payload for payload in self.last},
        }


def diagnose(run_dir: Path, *, now: float | None = None) -> Diagnosis:
    """Read a run folder once; see `Doctor`."""
    return Doctor(run_dir).diagnose(now=now)


class Doctor:
    """Reads a run folder, again and again.

    Raises ConfigError for a folder without any file of a run.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._files = RunFiles.of(run_dir)
        self._history = self._new_history()

    def _new_history(self) -> RunHistory:
        files, telemetry = self._files, self._files.telemetry
        own = {*telemetry.silenced, *(rule.name for rule in telemetry.rules)}
        return RunHistory(
            self._run_dir / METRICS_FILE,
            files.rules,
            files.derived.get("total_steps"),
            tuple(key for key, rule in _COUNTED.items() if rule.name not in own),
        )

    def diagnose(self, *, now: float | None = None) -> Diagnosis:
        """now: seconds since the epoch; None takes the clock. Raises ContractError for a broken metrics file."""
        before, self._files = self._files, RunFiles.of(self._run_dir)
        if before.resolved != self._files.resolved:
            self._history = self._new_history()
        self._history.read_on()
        now = time.time() if now is None else now
        beats = self._files.beats()
        state, age = self._state(beats, now)
        history = self._history
        last = [*list(history.last_train)[-1:], *history.evaluations[-1:]]
        return Diagnosis(
            self._run_dir,
            state,
            self._summary(state, age),
            history.step,
            self._files.derived.get("total_steps"),
            tuple(self._complaints(state, age, beats, now)),
            tuple(beats),
            self._files.missing,
            tuple(last),
            now,
        )

    # where it stands

    def _state(self, beats: Sequence[RankBeat], now: float) -> tuple[str, float | None]:
        """How the run is, and the age of its last number in seconds."""
        metrics_file, last = self._run_dir / METRICS_FILE, self._history.last
        age = now - metrics_file.stat().st_mtime if last is not None else None
        total_steps = self._files.derived.get("total_steps")
        stopped = [beat.end.reason for beat in beats if beat.end and beat.end.how == STOPPED]
        if ranks.broken(beats):
            return "broken off", age
        if stopped:
            return f"stopped by the rule {stopped[0]}", age
        if any(beat.end is None for beat in beats) and not ranks.dead(beats, now):
            return "starting" if last is None else "running", age
        if last is not None and (
            keys_run.TRAIN_RUNTIME in last["metrics"]
            or (total_steps is not None and self._history.step >= total_steps)
        ):
            return "finished", age
        if beats and all(beat.end is not None for beat in beats):
            return "finished", age
        if beats:
            silent = len(ranks.dead(beats, now)) == len(beats)
            return "silent" if silent else "starting" if last is None else "running", age
        if age is None:
            return "silent", age
        return "silent" if age > max(STALE_AFTER_S, 5 * self._interval()) else "running", age

    def _interval(self) -> float:
        """Seconds between two training records."""
        train = self._history.last_train
        if len(train) < 2:
            return 0.0
        num_steps = train[-1]["global_step"] - train[0]["global_step"]
        return float(num_steps) * float(train[-1]["metrics"].get(keys_run.TRAIN_SPEED, 0.0))

    def _summary(self, state: str, age: float | None) -> str:
        files, total_steps = self._files, self._files.derived.get("total_steps")
        of = "" if total_steps is None else f" of {total_steps}"
        config = str(files.resolved.get("config_hash", "unknown"))[:12]
        shown = f"{files.variant}, config {config}, step {self._history.step}{of}"
        if state in ("running", "silent") and age is not None:
            return f"{shown}, last number {_duration(age)} ago"
        return shown if state == "silent" else f"{shown}, {state}"

    # what is wrong

    def _complaints(
        self, state: str, age: float | None, beats: Sequence[RankBeat], now: float
    ) -> Iterator[Complaint]:
        files, history = self._files, self._history
        is_finished = state == "finished"
        yield from self._missing(state, beats)
        yield from self._ended(beats)
        yield from self._ranks(state, beats, now)
        if state == "silent" and not beats and age is not None:
            yield Complaint("rank", _silent(age))
        if history.last_train:  # evaluations alone leave none
            yield from self._stats_behind(history.last_train[-1])
        wrong = best_checkpoint(
            self._run_dir,
            files.derived,
            history.evaluations,
            is_finished=is_finished,
            evaluated_last=history.last is not None and history.last["mode"] == "eval",
        )
        if wrong is not None:
            yield Complaint("checkpoint", wrong)
        for key, counted in history.counts.items():
            yield Complaint(
                "count",
                f"{key}: {counted.total:g} over the run, first at step {counted.first}, last at step {counted.last}. "
                f"What to do: {_COUNTED[key].action}.",
            )
        audit = audit_command(self._run_dir, files.resolved)
        for finding in history.findings():
            hint = f" `{audit}` tells whether {_AUDITED}." if finding.audited else ""
            yield Complaint("rule", f"step {finding.step}: {finding.message}{hint}", finding)
        for text in self._advice():
            yield Complaint("setting", text)

    def _missing(self, state: str, beats: Sequence[RankBeat]) -> Iterator[Complaint]:
        files = self._files
        error = files.last_error()
        said = f" Its last error: {error}" if error else ""
        if not files.resolved:
            yield Complaint(
                "file",
                f"{RESOLVED_FILE} is missing, so the run ended before its trainer was set up (missing too: "
                f"{', '.join(name for name in files.missing if name != RESOLVED_FILE) or 'nothing'}).{said} What to "
                "do: read the end of run.log, mend what it names, and start again.",
            )
        elif self._history.last is None and state != "starting" and not ranks.broken(beats):
            missing = ", ".join(files.missing) or "nothing"
            yield Complaint(
                "file",
                f"the run has logged nothing (missing files: {missing}).{said} What to do: look at its console output; "
                "it stopped before the first log, or has just started.",
            )

    def _ended(self, beats: Sequence[RankBeat]) -> Iterator[Complaint]:
        broken = ranks.broken(beats)
        if not broken:
            return
        first = broken[0]
        assert first.end is not None
        also = ", ".join(f"rank {beat.rank}" for beat in broken[1:])
        yield Complaint(
            "rank",
            f"{ranks.name_of(first)} broke off at step {first.step}, {first.doing}: {first.end.reason}"
            f"{f' (then {also})' if also else ''}. What to do: {POSTMORTEM_FILE} has its stack and the last records; "
            "mend the cause, then resume with --resume_from_checkpoint and the newest checkpoint.",
        )

    def _ranks(self, state: str, beats: Sequence[RankBeat], now: float) -> Iterator[Complaint]:
        never = ranks.missing(beats)
        if never and not ranks.broken(beats):
            names = ", ".join(f"rank {rank}" for rank in never)
            yield Complaint("rank", f"{names} never came up. What to do: read the end of run.log.")
        if not any(beat.end is not None and beat.end.how != FAILED for beat in beats):
            for beat in ranks.dead(beats, now):
                yield Complaint(
                    "rank",
                    f"{ranks.name_of(beat)} is dead: it said nothing for {_duration(now - beat.time)}, after step "
                    f"{beat.step}, {beat.doing}. What to do: look at the end of run.log and at the system's log "
                    "(killed for memory?), then resume with --resume_from_checkpoint and the newest checkpoint.",
                )
        for beat in ranks.hanging(beats, now, max(STALE_AFTER_S, 5 * self._interval())):
            yield Complaint(
                "rank",
                f"the run hangs: {ranks.name_of(beat)} is the furthest behind, {_duration(now - beat.step_time)} in "
                f"the step after {beat.step}. What to do: see runbooks/when_it_breaks.md; SIGTERM to it leaves its "
                f"stack in {POSTMORTEM_FILE}.",
            )
        if state == "running":
            for beat, usual in ranks.stragglers(beats):
                yield Complaint(
                    "rank",
                    f"the others wait for {ranks.name_of(beat)}: it is busy for {beat.busy_s:.3g} s of a step, they "
                    f"for {usual:.3g} s. What to do: look for other jobs, a slow disk or a hot device on {beat.host}.",
                )

    def _stats_behind(self, last: Payload) -> Iterator[Complaint]:
        path = self._run_dir / STATS_FILE
        try:
            step = read_json(path)["global_step"] if path.exists() else None
        except (RecordError, KeyError, TypeError):
            step = None
        if step is None or step < last["global_step"]:
            found = "is missing or broken" if step is None else f"is at step {step}"
            yield Complaint(
                "file",
                f"{path.name} {found}, {METRICS_FILE} at step {last['global_step']}: a write failed. What to do: check "
                "the free space and the permissions of the folder.",
            )

    def _advice(self) -> list[str]:
        """What the settings leave untrained."""
        resolved = self._files.resolved
        swift, offset = resolved.get("swift", {}), resolved.get("custom", {}).get("coord_offset", {})
        return advice(swift, coord_offset=bool(offset.get("enabled"))) if "tuner_type" in swift else []


def _silent(age: float) -> str:
    return (
        f"the run has stopped: its last number is {_duration(age)} old. What to do: look at the end of its console "
        "output; if the process is gone, resume with --resume_from_checkpoint and the newest checkpoint; if it is "
        "there, it hangs (see runbooks/when_it_breaks.md)."
    )


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
