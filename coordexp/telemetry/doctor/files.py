"""What there is of a run: its files, also those of a run that died before it wrote most of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from coordexp.config.run.resolved import RESOLVED_FILE
from coordexp.config.schema.telemetry import Telemetry
from coordexp.errors import ConfigError, RecordError
from coordexp.files import read_json
from coordexp.metrics.sinks import METRICS_FILE, STATS_FILE
from coordexp.telemetry.life.beats import FOLDER, RankBeat, read_beats
from coordexp.telemetry.life.postmortem import POSTMORTEM_FILE
from coordexp.telemetry.rules.rule import WatchRule
from coordexp.telemetry.rules.table import rules_of
from coordexp.telemetry.run_log import HEADER, RUN_LOG

EXPECTED = (RESOLVED_FILE, METRICS_FILE, STATS_FILE, RUN_LOG, FOLDER)
_TRACES = (RUN_LOG, FOLDER, METRICS_FILE, "args.json", "logging.jsonl")
"""Any of them makes a folder the output of a run."""
_OF_RULES = ("rules", "silenced", "stop_on")
_TAIL_BYTES = 1 << 16
_ERROR = re.compile(r"^(?:\[rank \d+\] ?:? ?)?(coordexp: .+|[\w.]*(?:Error|Exception|Interrupt|Exit)\b.*)$")


@dataclass(frozen=True)
class RunFiles:
    """resolved: `resolved_config.json`, empty where it is missing.  missing: names of files that a run has."""

    run_dir: Path
    resolved: dict[str, Any]
    missing: tuple[str, ...]

    @classmethod
    def of(cls, run_dir: Path) -> RunFiles:
        """Raises ConfigError for a folder without any file of a run, or with a broken resolved_config.json."""
        path = run_dir / RESOLVED_FILE
        missing = tuple(name for name in EXPECTED if not (run_dir / name).exists())
        if path.is_file():
            resolved = read_json(path, error=ConfigError)
            if not isinstance(resolved, dict):
                raise ConfigError(f"{path}: holds a {type(resolved).__name__}; expected a mapping.")
            return cls(run_dir, resolved, missing)
        if any((run_dir / name).exists() for name in _TRACES):
            return cls(run_dir, {}, missing)
        below = sorted(str(found.parent) for found in run_dir.glob(f"*/{RESOLVED_FILE}"))
        hint = f" Runs below it: {', '.join(below)}." if below else ""
        raise ConfigError(f"{run_dir}: no {RESOLVED_FILE} there; expected the output folder of a run.{hint}")

    @property
    def derived(self) -> dict[str, Any]:
        """What follows from the settings."""
        found: dict[str, Any] = self.resolved.get("derived", {})
        return found

    @property
    def variant(self) -> str:
        """The trainer variant; `unknown variant` where it is not known."""
        return str(self.resolved.get("trainer_variant", "unknown variant"))

    @property
    def telemetry(self) -> Telemetry:
        """What it says of rules. Raises ConfigError where this version cannot read that."""
        given = self.resolved.get("telemetry") or {}
        try:
            return Telemetry.model_validate({name: given[name] for name in _OF_RULES if name in given})
        except ValidationError as error:
            path = self.run_dir / RESOLVED_FILE
            raise ConfigError(
                f"{path}: its telemetry section cannot be read by this version: {error}"
            ) from None

    @property
    def rules(self) -> tuple[WatchRule, ...]:
        """What it is judged by. Raises ConfigError where this version cannot read them."""
        try:
            return rules_of(self.telemetry, self.variant)
        except ValueError as error:
            path = self.run_dir / RESOLVED_FILE
            raise ConfigError(f"{path}: telemetry.rules cannot be read by this version: {error}") from None

    def beats(self) -> list[RankBeat]:
        """What its ranks said last."""
        return read_beats(self.run_dir)

    def postmortem(self) -> dict[str, Any] | None:
        """What was written when it broke off; None where nothing was."""
        path = self.run_dir / POSTMORTEM_FILE
        try:
            content = read_json(path) if path.exists() else None
        except RecordError:
            return None
        return content if isinstance(content, dict) else None

    def last_error(self) -> str | None:
        """The last line of the last attempt in run.log that names an error."""
        path = self.run_dir / RUN_LOG
        if not path.exists():
            return None
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            text = stream.read().decode(errors="replace")
        lines = text[max(0, text.rfind(HEADER)) :].splitlines()
        found = [match.group(1) for line in lines if (match := _ERROR.match(line))]
        return found[-1] if found else None
