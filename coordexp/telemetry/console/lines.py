"""From the payloads of a run to the lines of the newest one.

view = ConsoleView(max_steps=400)
history = remember(history, payload)
for text in console_lines(history, view): print(text.plain)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text

from coordexp.metrics import keys_run
from coordexp.metrics.payload import Payload
from coordexp.telemetry.console.evaluation import EvaluatedStep, comparison_lines, end_line, evaluation_line
from coordexp.telemetry.console.levels import atom_lines, run_lines, step_line
from coordexp.telemetry.console.view import ConsoleView

TRAIN, EVAL = "train", "eval"
LEVEL_OF_COMPARISONS = 4


def remember(history: Sequence[Payload], payload: Payload) -> list[Payload]:
    """The history with one more payload, without those that no later line looks at.

    Kept are all evaluations, of one step the newest, and the newest record of training.
    """
    is_train = payload["mode"] == TRAIN
    kept = [
        old
        for old in history
        if (old["mode"] == TRAIN and not is_train)
        or (old["mode"] == EVAL and (is_train or old["global_step"] != payload["global_step"]))
    ]
    return [*kept, payload]


def console_lines(
    history: Sequence[Payload], payload: Payload, view: ConsoleView, *, remaining: str | None = None
) -> list[Text]:
    """What is said of `payload`, after those of `history`.

    remaining: time to the end of the run, in words.
    """
    step, numbers = payload["global_step"], payload["metrics"]
    if payload["mode"] == EVAL:
        now = EvaluatedStep(step, numbers)
        return [evaluation_line(step, numbers, view), *_comparison(history, now, view)]
    if keys_run.TRAIN_RUNTIME in numbers:
        return [end_line(step, numbers, view)]
    before = max((old["global_step"] for old in history if old["mode"] == TRAIN), default=0)
    lines = []
    if view.is_due(1, step, before):
        lines.append(step_line(step, numbers, view, remaining))
    if view.is_due(2, step, before):
        lines += atom_lines(step, numbers, view)
    if view.is_due(3, step, before):
        lines += run_lines(step, numbers, view, payload.get("tags"))
    return lines


def _comparison(history: Sequence[Payload], now: EvaluatedStep, view: ConsoleView) -> list[Text]:
    if view.settings.level < LEVEL_OF_COMPARISONS:
        return []
    earlier = [
        EvaluatedStep(old["global_step"], old["metrics"])
        for old in history
        if old["mode"] == EVAL and old["global_step"] < now.step
    ]
    return comparison_lines(now, earlier, view)


def written(lines: Sequence[Text], *, colours: bool, environment: Mapping[str, str] = os.environ) -> str:
    """The lines as text, with the escape sequences of a terminal where colours are asked for.

    `NO_COLOR` and `TERM=dumb` in the environment ask for none.
    """
    if not colours or environment.get("NO_COLOR") or environment.get("TERM") == "dumb":
        return "\n".join(text.plain for text in lines)
    console = Console(
        force_terminal=True, color_system="standard", soft_wrap=True, highlight=False, _environ={}
    )
    with console.capture() as captured:
        for text in lines:
            console.print(text)
    return captured.get().rstrip("\n")
