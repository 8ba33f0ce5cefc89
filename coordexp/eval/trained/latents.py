"""A latent prefix beside what it is held against: the same answers of the evaluation set, read after other prompts.

latent vectors      evaluated at the checkpoint's step
text of the prompt  at the same step
first M tokens, no list, most frequent first token    logged with the first evaluation
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from coordexp.metrics import keys_stage1 as keys
from coordexp.metrics.catalog import EVAL_PREFIX
from coordexp.metrics.sinks import METRICS_FILE, read_payloads

_KEYS: dict[str, tuple[str | None, str]] = {
    "the latent vectors": (keys.LATENT_NLL, keys.LATENT_FIRST_TOKEN_ACC),
    "the text of the prompt": (keys.LATENT_TEXT_NLL, keys.LATENT_TEXT_FIRST_TOKEN_ACC),
    "as many first tokens of the text": (
        keys.LATENT_OTHER_NLL["cut"],
        keys.LATENT_OTHER_FIRST_TOKEN_ACC["cut"],
    ),
    "no list": (keys.LATENT_OTHER_NLL["none"], keys.LATENT_OTHER_FIRST_TOKEN_ACC["none"]),
    "nothing: the most frequent first token": (None, keys.LATENT_MAJORITY_FIRST_TOKEN),
}


class PromptRow(NamedTuple):
    """How well the answers of the evaluation set are foreseen after one prompt.

    nll: nats a token, None for what reads no answer.  first_token: share of first open tokens that are put first.
    step: of the evaluation that logged it.
    """

    prompt: str
    nll: float | None
    first_token: float
    step: int

    @property
    def text(self) -> str:
        """In words."""
        nats = "" if self.nll is None else f"{self.nll:.4f} nats a token, "
        return f"{nats}{self.first_token:.1%} of first tokens right (step {self.step})"


def prompt_rows(run: Path, step: int | None = None) -> list[PromptRow]:
    """The rows of a training run with a latent prefix; empty for a run that logged none, or no run.

    step: of the checkpoint that is looked at; None, or a step that was not evaluated: the last evaluation.
    """
    evaluations = _evaluations(run)
    if not evaluations:
        return []
    now = step if step in evaluations else max(evaluations)
    found = [_row(name, nll, accuracy, evaluations, now) for name, (nll, accuracy) in _KEYS.items()]
    return [row for row in found if row is not None]


def prompt_facts(checkpoint: Path) -> dict[str, str]:
    """The rows of the run that a checkpoint comes from, in words."""
    step = checkpoint.resolve().name.removeprefix("checkpoint-")
    rows = prompt_rows(checkpoint.parent, int(step) if step.isdigit() else None)
    return {f"answers after {row.prompt}": row.text for row in rows}


def _evaluations(run: Path) -> dict[int, dict[str, float]]:
    """Evaluations with a latent prefix by step; of a step that was evaluated twice, all numbers, the later ones first.

    A run that was resumed logs a step again, but not what is logged once.
    """
    path = run / METRICS_FILE
    found: dict[int, dict[str, float]] = {}
    for payload in read_payloads(path) if path.is_file() else ():
        numbers = {key: float(value) for key, value in payload["metrics"].items()}
        if payload["mode"] == "eval" and EVAL_PREFIX + keys.LATENT_NLL in numbers:
            found[payload["global_step"]] = found.get(payload["global_step"], {}) | numbers
    return found


def _row(
    name: str, nll: str | None, accuracy: str, evaluations: Mapping[int, Mapping[str, float]], now: int
) -> PromptRow | None:
    """As the evaluation of step `now` logged it, else the first one that did; None where none did."""
    logged = [step for step in (now, *sorted(evaluations)) if EVAL_PREFIX + accuracy in evaluations[step]]
    if not logged:
        return None
    numbers = evaluations[logged[0]]
    found = None if nll is None else numbers.get(EVAL_PREFIX + nll)
    return PromptRow(name, found, numbers[EVAL_PREFIX + accuracy], logged[0])
