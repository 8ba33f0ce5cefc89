"""The tables of a report, and where its runs came from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coordexp.eval.evaluate import METRICS
from coordexp.eval.predictions.artifacts import RUN_META
from coordexp.eval.predictions.scored import recorded_decoding
from coordexp.eval.report.headline import MEASURES
from coordexp.eval.report.numbers import ClassRow, RunNumbers, class_rows, drop_reasons, size_rows
from coordexp.eval.report.verdicts import verdict_facts
from coordexp.eval.trained.latents import prompt_facts
from coordexp.files import read_json

MAX_UNKNOWN_CLASSES = 30
"""Rows of the class table for descriptions that nobody annotated; the others are counted."""


def size_table(runs: Sequence[RunNumbers]) -> list[dict[str, Any]]:
    """Rows of size x run, with the scores worked out."""
    rows = []
    for by_run in zip(*(size_rows(numbers) for numbers in runs), strict=True):
        for row, numbers in zip(by_run, runs, strict=True):
            rows.append(
                {
                    **row._asdict(),
                    "run": numbers.run.name,
                    "recall": row.found / row.num_gt if row.num_gt else None,
                    "precision": row.right / row.num_pred if row.num_pred else None,
                }
            )
    return rows


def class_table(
    runs: Sequence[RunNumbers], *, most_unknown: int | None = MAX_UNKNOWN_CLASSES
) -> list[dict[str, Any]]:
    """Descriptions with their row in every run (None where a run never names it), annotated ones first.

    most_unknown: of descriptions that nobody annotated; None for all.
    """
    tables = [{row.name: row for row in class_rows(numbers)} for numbers in runs]
    annotated = [name for name, row in tables[0].items() if row.counts.tp + row.counts.fn]
    return [
        {
            "name": name,
            "num_gt": num_gt,
            "runs": [_class_cells(table.get(name)) for table in tables],
        }
        for name in [*annotated, *unknown_classes(runs)[:most_unknown]]
        for num_gt in [sum(tables[0][name].counts[::2]) if name in tables[0] else 0]
    ]


def _class_cells(row: ClassRow | None) -> dict[str, Any]:
    if row is None:
        return dict.fromkeys(("tp", "fp", "fn", "precision", "recall", "f1", "ap"))
    tp, fp, fn = row.counts
    scores = row.counts.scores
    return {
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "precision": scores.precision if tp + fp else None,
        "recall": scores.recall if tp + fn else None,
        "f1": scores.f1,
        "ap": row.average_precision,
    }


def unknown_classes(runs: Sequence[RunNumbers]) -> list[str]:
    """Predicted descriptions that are not annotated anywhere, most frequent first."""
    predicted: dict[str, int] = {}
    for numbers in runs:
        for row in class_rows(numbers):
            if row.counts.tp + row.counts.fn == 0:
                predicted[row.name] = predicted.get(row.name, 0) + row.counts.fp
    return sorted(predicted, key=lambda name: (-predicted[name], name))


def drop_table(runs: Sequence[RunNumbers]) -> list[tuple[str, list[int]]]:
    by_run = [drop_reasons(numbers) for numbers in runs]
    reasons = dict.fromkeys(reason for reasons in by_run for reason in reasons)
    return [(reason.replace("_", " "), [found.get(reason, 0) for found in by_run]) for reason in reasons]


def facts(numbers: RunNumbers) -> dict[str, str]:
    """Where a run came from, as far as its folder says."""
    run = numbers.run
    facts = {"run folder": str(run.directory), "images": str(run.image_root)}
    if (run.directory / RUN_META).is_file():
        recorded = read_json(run.directory / RUN_META)
        facts |= {name: str(recorded[name]) for name in ("model", "data", "backend")}
        facts |= verdict_facts(Path(str(recorded["model"])))
        facts |= prompt_facts(Path(str(recorded["model"])))
        decoding = recorded_decoding(run.directory) or {}
        facts["decoding"] = ", ".join(f"{name} {value}" for name, value in decoding.items())
        if "latents" in recorded:
            facts["latent prefix"] = ", ".join(
                f"{name} {value}" for name, value in recorded["latents"].items()
            )
        if "cut_prompt" in recorded:
            facts["prompt cut to"] = f"{recorded['cut_prompt']} tokens"
    seconds = run.detections.seconds
    if seconds:
        num_pred, num_images = (numbers.evaluation.metrics[key] for key in ("num_pred", "num_images"))
        facts["speed"] = f"{num_pred / seconds:.1f} boxes/s, {num_images / seconds:.2f} images/s"
    asked = [trace.num_prompt_tokens for trace in run.traces.values() if trace.num_prompt_tokens is not None]
    if asked:
        facts["prompt"] = f"{sum(asked) / len(asked):.1f} tokens an image, its picture's among them"
    return facts | _other_metrics(numbers)


def _other_metrics(numbers: RunNumbers) -> dict[str, str]:
    """A word on the run's metrics.json where it says something else, having been made with other settings."""
    path = numbers.run.directory / METRICS
    if not path.is_file():
        return {}
    written = read_json(path)
    differing = [
        f"{measure.key} {written[measure.key]:.4f}"
        for measure in MEASURES
        if _differs(written.get(measure.key), numbers.evaluation.metrics[measure.key])
    ]
    if not differing:
        return {}
    settings = ", ".join(f"{name} {value}" for name, value in written.get("settings", {}).items())
    return {
        f"{METRICS} differs": f"{', '.join(differing)}; it was made with: {settings or 'unknown settings'}"
    }


def _differs(written: float | None, computed: float | None) -> bool:
    """Of two numbers; one that is not known says nothing."""
    return written is not None and computed is not None and abs(written - computed) > 1e-9
