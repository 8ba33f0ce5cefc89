"""The controllers of a run between its trainer and its files: knobs before a step, decisions after a log window."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coordexp.config.contradictions.controllers import knob_values
from coordexp.config.schema.sections import Sections
from coordexp.config.schema.training import B_RATIO, SoftctxEconomy
from coordexp.control.controllers.bank import NO_KNOBS, ControllerBank, Knobs
from coordexp.control.controllers.decisions import Decision
from coordexp.control.controllers.economy import ForwardsSeen
from coordexp.control.controllers.share import AccumulatedShare
from coordexp.errors import ContractError
from coordexp.files import append_jsonl, read_jsonl, write_jsonl
from coordexp.metrics.keys_control import (
    SOFTCTX_ENTROPY_CHANGE,
    SOFTCTX_FORWARDS,
    SOFTCTX_GAIN,
    control_key,
)

CONTROL_KEY = "CoordExpControl"
"""Where the state of the controllers lives in trainer_state.json, beside the states of callbacks."""
CONTROL_FILE = "control.jsonl"


class Steering:
    """All ranks hold one, see the same numbers and decide the same.

    is_main: append decisions to `control.jsonl` in `run_dir`.  A dry run steers nothing, whatever is declared.
    """

    def __init__(self, variant: str, sections: Sections, run_dir: str | Path, is_main: bool) -> None:
        declared = [] if sections.custom.dry_run else sections.control.controllers
        self._bank = ControllerBank(declared, knob_values(variant, sections)) if declared else None
        self._path = Path(run_dir) / CONTROL_FILE if is_main else None
        self.measures_forwards = any(isinstance(one, SoftctxEconomy) for one in declared)
        self.share = AccumulatedShare()
        self._last: list[Decision] = []

    def knobs(self) -> Knobs:
        """In force for the step that is about to be planned."""
        return NO_KNOBS if self._bank is None else self._bank.knobs()

    def observed(self, step: int, window: Mapping[str, float]) -> dict[str, float]:
        """What the controllers say of a finished window, for its record; from here on their new knobs are in force.

        step: optimizer steps done.  window: reduced over all ranks.
        """
        if self._bank is None:
            return {}
        forwards = window.get(SOFTCTX_FORWARDS)
        seen = (
            None
            if forwards is None
            else ForwardsSeen(forwards, window.get(SOFTCTX_GAIN), window.get(SOFTCTX_ENTROPY_CHANGE))
        )
        self._last = self._bank.observe(window, seen)
        for decision in self._last:
            if self._path is not None:
                append_jsonl(self._path, decision.record(step))
        return {
            control_key(decision.controller, name): value
            for decision in self._last
            for name, value in decision.numbers.items()
        }

    def tags(self) -> dict[str, str]:
        """Labels of the last decisions, under the keys of their values."""
        return {control_key(one.controller, "value"): one.label for one in self._last if one.labels}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; empty without controllers."""
        if self._bank is None:
            return {}
        return {"controllers": self._bank.state(), B_RATIO: self.share.state()}

    def restore(self, kept: Mapping[str, Any] | None, step: int) -> None:
        """Go on from what the checkpoint of `step` kept (None: it kept nothing), and forget later decisions.

        A run that begins at step 0 forgets those of an earlier one in its folder.
        """
        if self._bank is None:
            return
        if kept is not None:
            state = kept["attributes"]
            self._bank.restore(state["controllers"])
            self.share.restore(state[B_RATIO])
        if self._path is not None and self._path.exists():
            rows = [row for _, row in read_jsonl(self._path, error=ContractError, skip_broken=True)]
            write_jsonl(self._path, [row for row in rows if row["step"] <= step])
