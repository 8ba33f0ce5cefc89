"""What a run says of its records on the console, and so in run.log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from coordexp.metrics.payload import Payload
from coordexp.metrics.sinks import METRICS_FILE, read_payloads
from coordexp.telemetry.console.lines import console_lines, remember, written
from coordexp.telemetry.console.view import ConsoleView


class RunConsole:
    """say: prints lines.  colours: whether a terminal shows them."""

    def __init__(self, say: Callable[[str], None], *, colours: bool) -> None:
        self._say, self._colours = say, colours
        self._history: list[Payload] = []

    def resume(self, run_dir: str | Path, step: int) -> None:
        """Go on after what was recorded in a run folder up to optimizer step `step`."""
        path = Path(run_dir) / METRICS_FILE
        if step == 0 or not path.exists():
            return
        for payload in read_payloads(path):
            if payload["global_step"] <= step:
                self._history = remember(self._history, payload)

    def show(self, payload: Payload, view: ConsoleView, remaining: str | None) -> None:
        """Say what there is to say of a payload. remaining: time to the end of the run, in words."""
        lines = console_lines(self._history, payload, view, remaining=remaining)
        self._history = remember(self._history, payload)
        if lines:
            self._say(written(lines, colours=self._colours))
