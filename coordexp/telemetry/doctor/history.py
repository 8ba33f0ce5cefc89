"""The records of a run, judged by its rules as they come; a second reading goes on where the first one ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from coordexp.errors import ContractError
from coordexp.metrics.payload import Payload, validate_payload
from coordexp.metrics.sinks import RUN_META
from coordexp.telemetry.rules.rule import WatchRule
from coordexp.telemetry.rules.watch import Judge, RuleFinding, WatchState

RECENT_WINDOWS = 3
"""Training records whose findings are reported, beside those of the last evaluation."""


@dataclass(frozen=True)
class Counted:
    """A number that should stay 0, over a whole run."""

    total: float
    first: int
    last: int


class RunHistory:
    """counted: keys that are added up over the run."""

    def __init__(
        self, path: Path, rules: Sequence[WatchRule], total_steps: int | None, counted: Sequence[str] = ()
    ) -> None:
        self._path, self._judge = path, Judge(rules, total_steps)
        self._counted = tuple(counted)
        self._offset, self._line = 0, 0
        self._held: list[Payload] = []
        self._begin()

    def _begin(self) -> None:
        """As if there were no record."""
        self._state = WatchState()
        self._train: deque[tuple[RuleFinding, ...]] = deque(maxlen=RECENT_WINDOWS)
        self._eval: tuple[RuleFinding, ...] = ()
        self.step = 0
        self.last: Payload | None = None
        self.last_train: deque[Payload] = deque(maxlen=2)
        self.evaluations: list[Payload] = []
        self.counts: dict[str, Counted] = {}

    def read_on(self) -> None:
        """Take what was written since the last reading; half a line is left for the next one.

        Raises ContractError for a whole record that is no payload, naming file and line.
        """
        if not self._path.exists():
            return
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            content = stream.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            self._line += 1
            self._take(line)

    def findings(self) -> list[RuleFinding]:
        """What is wrong at the last records, the newest of each rule and number."""
        newest = {
            (finding.rule, finding.key): finding
            for findings in (*self._train, self._eval)
            for finding in findings
            if not finding.key.endswith(self._counted or ("\0",))
        }
        return sorted(newest.values(), key=lambda finding: finding.step)

    def _take(self, line: bytes) -> None:
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            return  # what a crash left
        if isinstance(record, Mapping) and record.get("record") == RUN_META:
            return
        try:
            payload = validate_payload(record)
        except ContractError as error:
            raise ContractError(f"{self._path}:{self._line}: {error}") from None
        if self.last is not None and payload["global_step"] < self.last["global_step"]:
            self._resume_at(payload["global_step"])
        self._held.append(payload)
        self._add(payload)

    def _resume_at(self, step: int) -> None:
        """Forget what came from this step on: the run went on from a checkpoint before it."""
        self._held = [payload for payload in self._held if payload["global_step"] < step]
        self._begin()
        for payload in self._held:
            self._add(payload)

    def _add(self, payload: Payload) -> None:
        step, metrics = payload["global_step"], payload["metrics"]
        self._state, findings = self._judge(self._state, step, metrics)
        self.step, self.last = max(self.step, step), payload
        if payload["mode"] == "train":
            self._train.append(findings)
            self.last_train.append(payload)
        else:
            self._eval = findings
            self.evaluations.append(payload)
        for key in self._counted:
            if metrics.get(key):
                before = self.counts.get(key, Counted(0.0, step, step))
                self.counts[key] = Counted(before.total + metrics[key], before.first, step)
