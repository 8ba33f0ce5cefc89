"""Level 4: the line of an evaluation, and what got better and worse since the last one and the best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text

from coordexp.metrics import keys_rollout, keys_run, keys_stage1, keys_tokens
from coordexp.metrics.catalog import EVAL_PREFIX, Kind, MetricSpec, lookup
from coordexp.telemetry.console.view import ConsoleView
from coordexp.telemetry.console.words import (
    BAD,
    GOOD,
    HEAD,
    QUIET,
    Numbers,
    ShownNumber,
    Writer,
    below,
    four,
    line,
    short,
)

MOST_SHOWN = 4
"""Numbers of a line of better or worse ones, the largest change first."""
NOT_COMPARED = frozenset({Kind.COUNTER, Kind.SECONDS, Kind.FLAG})
"""Counts go with the rates that they are parts of; time is not what an evaluation judges."""
_OF_FRACTIONS = frozenset({"fraction", "probability", "IoU", "AP", "cosine"})
"""Units of numbers whose changes are compared as they are; of others relative to the number."""


@dataclass(frozen=True)
class Ability:
    """What a label is about. The first of `keys` (without `eval_`) that an evaluation reports decides."""

    label: str
    keys: tuple[str, ...]


ABILITIES = (
    Ability("MAP", (keys_rollout.MAP, keys_rollout.F1_50_95)),
    Ability("F1", (keys_rollout.F1,)),
    Ability("RECALL", (keys_rollout.RECALL,)),
    Ability("PRECISION", (keys_rollout.PRECISION,)),
    Ability("BOXES", (keys_rollout.MATCHED_MASKIOU_MEAN, keys_stage1.COORD_DIAG_EXPECTED_BIN_MAE)),
    Ability(
        "NAMES",
        (
            keys_rollout.DESC_SEM_ACC_ON_MATCHED,
            keys_rollout.DESC_EXACT_ACC_ON_MATCHED,
            keys_tokens.DESC_TOKEN_ACC,
        ),
    ),
    Ability("FORMAT", (keys_rollout.SAMPLE_VALID_PRED_RATE, keys_tokens.FORMAT_TOKEN_ACC)),
    Ability("CLOSES", (keys_rollout.PARSE_TRUNCATED_RATE,)),
    Ability("REPEATS", (keys_rollout.DUPLICATE_RATE_MEAN,)),
    Ability("LOSS", (keys_run.LOSS,)),
)

_LINE = (
    ShownNumber(keys_run.EVAL_LOSS, "loss {}"),
    ShownNumber(EVAL_PREFIX + keys_rollout.F1, "F1 {}", short),
    ShownNumber(EVAL_PREFIX + keys_rollout.PRECISION, "precision {}", short),
    ShownNumber(EVAL_PREFIX + keys_rollout.RECALL, "recall {}", short),
    ShownNumber(EVAL_PREFIX + keys_rollout.MATCHED_MASKIOU_MEAN, "maskIoU {}", short),
    ShownNumber(EVAL_PREFIX + keys_rollout.MAP, "mAP {}", short),
    ShownNumber(keys_run.EVAL_RUNTIME, "{} s", short),
)


@dataclass(frozen=True)
class Change:
    """Of one number between two evaluations.  size: see `_OF_FRACTIONS`; positive where it got better."""

    spec: MetricSpec
    before: float
    now: float
    size: float


@dataclass(frozen=True)
class EvaluatedStep:
    """One that has been: its optimizer step and its numbers, with `eval_`."""

    step: int
    numbers: Numbers


def evaluation_line(step: int, numbers: Numbers, view: ConsoleView) -> Text:
    """What is said of an evaluation at every level."""
    return line(
        f"eval at step {step}/{view.max_steps}", Writer(step, numbers, view.is_healthy).numbers_of(*_LINE)
    )


def comparison_lines(now: EvaluatedStep, earlier: Sequence[EvaluatedStep], view: ConsoleView) -> list[Text]:
    """Level 4: this evaluation beside the last one, and beside the best one before it."""
    if not earlier:
        return []
    last, least = earlier[-1], view.settings.min_change
    changes = _changes(last.numbers, now.numbers)
    lines = [_labels(f"since step {last.step}", changes, least), *_better_and_worse(changes, least)]
    best = _best(now, earlier, view)
    if best is None:
        return lines
    if best.evaluation is not last:
        since_best = _changes(best.evaluation.numbers, now.numbers)
        lines.append(_labels(f"since the best, step {best.evaluation.step}", since_best, least))
    return [*lines, _beside(best, view)]


def _labels(head: str, changes: Sequence[Change], least: float) -> Text:
    labels = [
        Text(f"[{ability.label}{'+' if change.size > 0 else '-'}]", GOOD if change.size > 0 else BAD)
        for ability, change in _of_abilities(changes)
        if abs(change.size) >= least
    ]
    said = labels or [Text(f"nothing changed by {least:g} or more")]
    return Text(" ").join([Text(f"  {head}:", QUIET), *said])


def _better_and_worse(changes: Sequence[Change], least: float) -> Iterator[Text]:
    ordered = sorted(changes, key=lambda change: -abs(change.size))
    for head, sign in (("better", 1), ("worse", -1)):
        found = [change for change in ordered if sign * change.size >= least]
        if found:
            yield below(head, _written(found))


def _written(changes: Sequence[Change]) -> list[Text]:
    shown = [
        Text(f"{_name(change.spec)} {four(change.before)} -> {four(change.now)}")
        for change in changes[:MOST_SHOWN]
    ]
    more = len(changes) - len(shown)
    return [*shown, *([Text(f"{more} more")] if more else [])]


def _name(spec: MetricSpec) -> str:
    return spec.key.removeprefix(EVAL_PREFIX)


@dataclass(frozen=True)
class _Best:
    """The best evaluation before one, by the number that picks the best checkpoint.

    change: of that number since then.  num_without: evaluations after it, this one included.
    """

    evaluation: EvaluatedStep
    change: Change
    num_without: int


def _best(now: EvaluatedStep, earlier: Sequence[EvaluatedStep], view: ConsoleView) -> _Best | None:
    if view.best_metric is None:
        return None
    key = EVAL_PREFIX + view.best_metric
    spec = lookup(key)
    scored = [one for one in earlier if key in one.numbers]
    if spec is None or spec.better is None or key not in now.numbers or not scored:
        return None
    sign = 1 if spec.better == "higher" else -1
    best = max(scored, key=lambda one: (sign * one.numbers[key], -one.step))
    num_without = sum(one.step > best.step for one in scored) + 1
    return _Best(best, _change(spec, best.numbers[key], now.numbers[key]), num_without)


def _beside(best: _Best, view: ConsoleView) -> Text:
    change, step = best.change, best.evaluation.step
    against = f"{_name(change.spec)} {four(change.now)}, best before {four(change.before)} at step {step}"
    if change.size > 0:
        return Text.assemble("  ", ("[BEST]", GOOD), f" {against}")
    if best.num_without < view.settings.stall_after:
        return Text(f"  {against}")
    return Text.assemble(
        "  ", ("[STALL]", BAD), f" {against}; evaluations without a better one: {best.num_without}"
    )


def _of_abilities(changes: Sequence[Change]) -> Iterator[tuple[Ability, Change]]:
    by_key = {_name(change.spec): change for change in changes}
    for ability in ABILITIES:
        decides = next((key for key in ability.keys if key in by_key), None)
        if decides is not None:
            yield ability, by_key[decides]


def _changes(before: Numbers, now: Numbers) -> list[Change]:
    """Of all numbers that both evaluations have and that have a better direction."""
    found = []
    for key in now.keys() & before.keys():
        spec = lookup(key)
        if spec is None or spec.better is None or _is_not_compared(spec):
            continue
        found.append(_change(spec, before[key], now[key]))
    return sorted(found, key=lambda change: change.spec.key)


def _is_not_compared(spec: MetricSpec) -> bool:
    is_alias = spec.key.removeprefix(EVAL_PREFIX) in keys_stage1.COORD_SOFTCE_W1_ALIASES.values()
    return spec.kind in NOT_COMPARED or spec.unit.endswith("/s") or is_alias


def _change(spec: MetricSpec, before: float, now: float) -> Change:
    size = now - before if spec.better == "higher" else before - now
    if spec.unit not in _OF_FRACTIONS:
        size /= max(abs(before), abs(now)) or 1.0
    return Change(spec, before, now, size)


_END = (
    ShownNumber(keys_run.TRAIN_LOSS, "mean loss {}"),
    ShownNumber(keys_run.TRAIN_RUNTIME, "{} s"),
)


def end_line(step: int, numbers: Numbers, view: ConsoleView) -> Text:
    """Of the record at the end of a run."""
    return line(
        f"done at step {step}/{view.max_steps}",
        Writer(step, numbers, view.is_healthy).numbers_of(*_END),
        tone=HEAD,
    )
