"""Rules on the records of the run that is training. It changes nothing; `telemetry.stop_on` asks for the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coordexp.config.schema.telemetry import Telemetry
from coordexp.telemetry.rules.table import rules_of
from coordexp.telemetry.rules.watch import Judge, RuleFinding, WatchState, due

RULES_KEY = "CoordExpRules"
"""Where a checkpoint's trainer_state.json keeps what was watched."""


class RecordWatch:
    """Judges record after record on the main process.

    total_steps: of the run.
    """

    def __init__(self, settings: Telemetry, variant: str, total_steps: int | None) -> None:
        self._judge = Judge(rules_of(settings, variant), total_steps)
        self._stop_on = tuple(settings.stop_on)
        self._state = WatchState()
        self._held: dict[tuple[str, str], RuleFinding] = {}
        self.asks_to_stop = 0
        """1 + index in `telemetry.stop_on` of a rule that holds; 0 while none does."""

    def look(self, step: int, metrics: Mapping[str, float]) -> tuple[RuleFinding, ...]:
        """What is wrong at a record and was not said lately."""
        self._state, findings = self._judge(self._state, step, metrics)
        found = {(finding.rule, finding.key): finding for finding in findings}
        still = {name: finding for name, finding in self._held.items() if finding.key not in metrics}
        self._held = still | found
        asked = [
            index
            for index, name in enumerate(self._stop_on, start=1)
            if any(name == rule for rule, _ in found)
        ]
        self.asks_to_stop = self.asks_to_stop or (asked[0] if asked else 0)
        self._state, fresh = due(self._state, findings, step)
        return fresh

    @property
    def findings(self) -> tuple[RuleFinding, ...]:
        """What is wrong by the last record of each number."""
        return tuple(self._held.values())

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": self._state.to_json()}

    def restore(self, kept: Mapping[str, Any] | None) -> None:
        """Go on from the state of a checkpoint (None: from none)."""
        if kept is not None:
            self._state = WatchState.from_json(kept["attributes"])
