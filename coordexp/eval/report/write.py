"""One self-contained HTML file about one evaluated run, or about several side by side.

    write_report([Path("runs/demo/eval_mix")], Path("report.html"))

Pictures are embedded, styles and scripts are inline and the page forbids itself every request, so the file opens
from disk, can be sent and stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from coordexp.errors import ConfigError
from coordexp.eval.coco.evaluate import DEFAULT_ENGINE
from coordexp.eval.evaluate import METRICS, Evaluation
from coordexp.eval.predictions.artifacts import RUN_META
from coordexp.eval.predictions.scored import recorded_decoding
from coordexp.eval.report.bootstrap import (
    Interval,
    affordable_resamples,
    coco_matches,
    image_weights,
    interval,
    resample_indices,
    resampled_ap,
    resampled_f1,
)
from coordexp.eval.report.data import load_runs
from coordexp.eval.report.figures import report_figures, run_colors
from coordexp.eval.report.gallery import MAX_BOXES, gallery_cards, role_colors
from coordexp.eval.report.numbers import (
    ClassRow,
    RunNumbers,
    class_rows,
    compute_numbers,
    drop_reasons,
    size_rows,
)
from coordexp.eval.report.page import format_measure, write_page
from coordexp.eval.report.sweep import sweep_section
from coordexp.eval.report.verdicts import verdict_facts
from coordexp.files import read_json
from coordexp.geometry import FloatArray, IntArray

MAX_UNKNOWN_CLASSES = 30
"""Rows of the class table for descriptions that nobody annotated; the others are counted."""


class Measure(NamedTuple):
    """A row of the headline table."""

    key: str
    title: str
    meaning: str
    decimals: int = 3
    lower_is_better: bool = False


_ECE = "mean distance of a score and the share of right predictions"
_ISOTONIC = "scores mapped by a fit on the other half of the images"
MEASURES = (
    Measure("AP", "AP", "COCO, IoU 0.5:0.95, ranked by score"),
    Measure("AP_const", "AP, all scores 1.0", "what a model without confidences would get"),
    Measure("AP50", "AP at IoU 0.5", "COCO"),
    Measure("AP75", "AP at IoU 0.75", "COCO"),
    Measure("AR", "Average recall", "COCO, at most 100 detections per image (LVIS: 300)"),
    Measure("f1_50_95", "F1 at IoU 0.5:0.95", "mean over ten thresholds, box and description"),
    Measure("f1_at_95", "F1 at IoU 0.95", "boxes that fit to the pixel, nearly"),
    Measure("class_averaged_f1_50_95", "Class-averaged F1", "classes with 0 left out, IoU 0.5:0.95"),
    Measure(
        "duplicate_rate_mean",
        "Duplicates",
        "share of predictions that repeat an earlier one, mean over images",
        lower_is_better=True,
    ),
    Measure("f1_at_50", "F1 at IoU 0.5", "one-to-one matches of box and description"),
    Measure("precision_at_50", "Precision at IoU 0.5", "matched of all predicted objects"),
    Measure("recall_at_50", "Recall at IoU 0.5", "matched of all annotated objects"),
    Measure("box_f1_50_95", "F1 of boxes alone", "IoU 0.5:0.95, descriptions not looked at"),
    Measure("ece_at_50", "Calibration error at IoU 0.5", _ECE, lower_is_better=True),
    Measure("ece_isotonic_at_50", "the same, isotonic fit", _ISOTONIC, lower_is_better=True),
    Measure("ece_at_75", "Calibration error at IoU 0.75", _ECE, lower_is_better=True),
    Measure("ece_isotonic_at_75", "the same, isotonic fit", _ISOTONIC, lower_is_better=True),
    Measure("num_gt", "Objects annotated", "", 0),
    Measure("num_pred", "Objects predicted", "", 0),
)
_HEROES = ("AP", "AP_const", "f1_50_95", "f1_at_50")


@dataclass(frozen=True)
class ReportOptions:
    """num_worst, num_best: images of the gallery.  num_resamples: of the bootstrap, 0 for no intervals."""

    num_worst: int = 24
    num_best: int = 12
    num_resamples: int = 1000
    seed: int = 0
    engine: str = DEFAULT_ENGINE


class WrittenReport(NamedTuple):
    """What `write_report` made. num_missing: pictures of the gallery that could not be read."""

    path: Path
    num_images: int
    num_pictures: int
    num_missing: int


class Intervals(NamedTuple):
    """95 % intervals by key: of each run, and of each run's difference from the first (None for the first)."""

    of_run: list[dict[str, Interval]]
    of_difference: list[dict[str, Interval] | None]
    num_ap_resamples: int


def write_report(
    directories: Sequence[Path],
    output: Path,
    *,
    image_root: Path | None = None,
    options: ReportOptions | None = None,
) -> WrittenReport:
    """Evaluate the runs and write the page; the first run is what the others are compared with.

    Raises RecordError when a folder is no evaluated run, or when the runs are not of the same images and objects.
    """
    options = options or ReportOptions()
    if not directories:
        raise ConfigError("a report needs at least one run folder.")
    runs = [compute_numbers(run, engine=options.engine) for run in load_runs(directories, image_root)]
    intervals = bootstrap(runs, options.num_resamples, options.seed)
    cards = gallery_cards(runs, options.num_worst, options.num_best)
    num_missing = sum(card.picture is None for card in cards)
    write_page(
        output,
        "report.html.jinja",
        title=_title(runs),
        summary=_summary(runs),
        runs=[
            {"name": numbers.run.name, "color": color}
            for numbers, color in zip(runs, run_colors(len(runs)), strict=True)
        ],
        heroes=[_hero(measure, runs, intervals) for measure in MEASURES if measure.key in _HEROES],
        table=[(measure, _cells(measure, runs, intervals)) for measure in MEASURES],
        method=_method(runs, intervals, options),
        best_confidence=[_best_confidence(numbers) for numbers in runs],
        figures=report_figures(runs),
        sizes=_size_table(runs),
        classes=_class_table(runs),
        num_unlisted=max(0, len(_unknown_classes(runs)) - MAX_UNKNOWN_CLASSES),
        drops=_drop_table(runs),
        sweep=sweep_section(directories, image_root),
        cards=cards,
        groups=[
            group for group in ("worst", "best", "changed") if any(group in card.groups for card in cards)
        ],
        roles=role_colors(),
        max_boxes=MAX_BOXES,
        num_missing=num_missing,
        image_root=str(runs[-1].run.image_root),
        facts=[(numbers.run.name, _facts(numbers)) for numbers in runs],
    )
    return WrittenReport(output, len(runs[0].images), len(cards), num_missing)


def bootstrap(runs: Sequence[RunNumbers], num_resamples: int, seed: int) -> Intervals:
    """Intervals from `num_resamples` resamples of the images, the same ones for every run."""
    if not num_resamples:
        return Intervals([{} for _ in runs], [None for _ in runs], 0)
    weights_BN = image_weights(resample_indices(len(runs[0].images), num_resamples, seed))
    num_ap = min(_ap_resamples(numbers.evaluation, num_resamples) for numbers in runs)
    values = [_resampled(numbers.evaluation, weights_BN, num_ap) for numbers in runs]
    return Intervals(
        of_run=[{key: interval(found) for key, found in of_run.items()} for of_run in values],
        of_difference=[
            None if index == 0 else {key: interval(found - values[0][key]) for key, found in of_run.items()}
            for index, of_run in enumerate(values)
        ],
        num_ap_resamples=num_ap,
    )


def _ap_resamples(evaluation: Evaluation, num_resamples: int) -> int:
    if (
        evaluation.metrics["AP"] < 0 or evaluation.is_lvis
    ):  # no ground truth, or other rules than the resamples have
        return 0
    return affordable_resamples(num_resamples, len(evaluation.results), len(evaluation.dataset.category_ids))


def _resampled(evaluation: Evaluation, weights_BN: IntArray, num_ap: int) -> dict[str, FloatArray]:
    """Every number that has an interval, in every resample, under its key."""
    values = resampled_f1(weights_BN, evaluation.f1.counts_NT3)
    values["box_f1_50_95"] = resampled_f1(weights_BN, evaluation.box_f1.counts_NT3)["f1_50_95"]
    if num_ap:
        constant = replace(evaluation.results, score_M=np.ones_like(evaluation.results.score_M))
        values |= resampled_ap(weights_BN[:num_ap], coco_matches(evaluation.results))
        values["AP_const"] = resampled_ap(weights_BN[:num_ap], coco_matches(constant))["AP"]
    return values


def _cells(measure: Measure, runs: Sequence[RunNumbers], intervals: Intervals) -> list[dict[str, Any]]:
    """One cell per run: the number, its interval, and how it differs from the first run."""
    values = [numbers.headline(measure.key) for numbers in runs]
    cells = []
    for value, of_run, of_difference in zip(values, intervals.of_run, intervals.of_difference, strict=True):
        change = None
        if of_difference is not None and value is not None and values[0] is not None:
            change = _change(value - values[0], of_difference.get(measure.key), measure)
        cells.append(
            {
                "value": value,
                "text": format_measure(value, measure.decimals),
                "interval": _interval_text(of_run.get(measure.key), measure.decimals),
                "change": change,
            }
        )
    return cells


def _change(difference: float, found: Interval | None, measure: Measure) -> dict[str, Any]:
    """A difference from the first run; `sure` where the interval leaves zero out."""
    return {
        "text": f"{difference:+.{measure.decimals}f}",
        "interval": _interval_text(found, measure.decimals, sign="+"),
        "sure": found is not None and (found.low > 0 or found.high < 0),
        "better": (difference < 0) == measure.lower_is_better,
    }


def _hero(measure: Measure, runs: Sequence[RunNumbers], intervals: Intervals) -> dict[str, Any]:
    values = [numbers.headline(measure.key) for numbers in runs]
    return {
        "title": measure.title,
        "meaning": measure.meaning,
        "before": format_measure(values[0], measure.decimals) if len(runs) > 1 else None,
        "after": format_measure(values[-1], measure.decimals),
        "interval": _interval_text(intervals.of_run[-1].get(measure.key), measure.decimals),
    }


def _interval_text(found: Interval | None, decimals: int, sign: str = "") -> str | None:
    return None if found is None else f"{found.low:{sign}.{decimals}f} to {found.high:{sign}.{decimals}f}"


def _title(runs: Sequence[RunNumbers]) -> str:
    return " · ".join(numbers.run.name for numbers in runs)


def _summary(runs: Sequence[RunNumbers]) -> str:
    metrics = runs[0].evaluation.metrics
    num_classes = len({desc for image in runs[0].images for desc in image.gt.descs})
    text = f"{metrics['num_images']} images, {metrics['num_gt']} annotated objects of {num_classes} descriptions."
    if runs[0].evaluation.is_lvis:
        text += " Average precision is by the rules of LVIS."
    if len(runs) > 1:
        text += f" {len(runs)} runs on the same images; changes are against {runs[0].run.name}."
    return text


def _method(runs: Sequence[RunNumbers], intervals: Intervals, options: ReportOptions) -> str:
    if not options.num_resamples:
        return "No bootstrap intervals were asked for."
    text = (
        f"Ranges hold 95 % of {options.num_resamples} bootstrap resamples of the {len(runs[0].images)} images "
        f"(seed {options.seed}, percentiles)"
    )
    if len(runs) > 1:
        text += "; runs share the resamples, so changes are paired, and the range of a coloured change leaves zero out"
    num_ap = intervals.num_ap_resamples
    if not num_ap:
        is_lvis = runs[0].evaluation.is_lvis
        return text + (
            "; not for AP by LVIS." if is_lvis else "; not for AP, which has too many detections to resample."
        )
    fewer = f", AP from {num_ap} of them" if num_ap < options.num_resamples else ""
    return f"{text}{fewer}. Where classes have few images, AP of a resample runs high, and its range with it."


def _best_confidence(numbers: RunNumbers) -> dict[str, str] | None:
    if numbers.confidence.best is None:
        return None
    confidence, f1 = numbers.confidence.best
    return {"name": numbers.run.name, "f1": f"{f1:.3f}", "confidence": f"{confidence:.3f}"}


def _size_table(runs: Sequence[RunNumbers]) -> list[dict[str, Any]]:
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


def _class_table(runs: Sequence[RunNumbers]) -> list[dict[str, Any]]:
    """Descriptions with their row in every run (None where a run never names it), annotated ones first."""
    tables = [{row.name: row for row in class_rows(numbers)} for numbers in runs]
    annotated = [name for name, row in tables[0].items() if row.counts.tp + row.counts.fn]
    return [
        {
            "name": name,
            "num_gt": num_gt,
            "runs": [_class_cells(table.get(name)) for table in tables],
        }
        for name in [*annotated, *_unknown_classes(runs)[:MAX_UNKNOWN_CLASSES]]
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


def _unknown_classes(runs: Sequence[RunNumbers]) -> list[str]:
    """Predicted descriptions that are not annotated anywhere, most frequent first."""
    predicted: dict[str, int] = {}
    for numbers in runs:
        for row in class_rows(numbers):
            if row.counts.tp + row.counts.fn == 0:
                predicted[row.name] = predicted.get(row.name, 0) + row.counts.fp
    return sorted(predicted, key=lambda name: (-predicted[name], name))


def _drop_table(runs: Sequence[RunNumbers]) -> list[tuple[str, list[int]]]:
    by_run = [drop_reasons(numbers) for numbers in runs]
    reasons = dict.fromkeys(reason for reasons in by_run for reason in reasons)
    return [(reason.replace("_", " "), [found.get(reason, 0) for found in by_run]) for reason in reasons]


def _facts(numbers: RunNumbers) -> dict[str, str]:
    """Where a run came from, as far as its folder says."""
    run = numbers.run
    facts = {"run folder": str(run.directory), "images": str(run.image_root)}
    if (run.directory / RUN_META).is_file():
        recorded = read_json(run.directory / RUN_META)
        facts |= {name: str(recorded[name]) for name in ("model", "data", "backend")}
        facts |= verdict_facts(Path(str(recorded["model"])))
        decoding = recorded_decoding(run.directory) or {}
        facts["decoding"] = ", ".join(f"{name} {value}" for name, value in decoding.items())
    seconds = run.detections.seconds
    if seconds:
        num_pred, num_images = (numbers.evaluation.metrics[key] for key in ("num_pred", "num_images"))
        facts["speed"] = f"{num_pred / seconds:.1f} boxes/s, {num_images / seconds:.2f} images/s"
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
