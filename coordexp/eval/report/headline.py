"""The headline numbers: what they are, and each of them with its interval and its distance from the first run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from coordexp.eval.report.bootstrap import Interval
from coordexp.eval.report.intervals import Intervals
from coordexp.eval.report.numbers import RunNumbers
from coordexp.eval.report.page import format_measure


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
HEROES = ("AP", "AP_const", "f1_50_95", "f1_at_50")


def headline_cells(
    measure: Measure, runs: Sequence[RunNumbers], intervals: Intervals
) -> list[dict[str, Any]]:
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


def headline_json(runs: Sequence[RunNumbers], intervals: Intervals) -> list[dict[str, Any]]:
    """Of each run: key -> value, interval, and difference from the first run (None where there is none)."""
    first = {measure.key: runs[0].headline(measure.key) for measure in MEASURES}
    return [
        {
            measure.key: {
                "value": value,
                "interval": of_run.get(measure.key),
                "difference": _difference_json(value, first[measure.key], of_difference, measure.key),
            }
            for measure in MEASURES
            for value in [numbers.headline(measure.key)]
        }
        for numbers, of_run, of_difference in zip(
            runs, intervals.of_run, intervals.of_difference, strict=True
        )
    ]


def _difference_json(
    value: float | None, first: float | None, of_difference: dict[str, Interval] | None, key: str
) -> dict[str, Any] | None:
    if of_difference is None or value is None or first is None:
        return None
    found = of_difference.get(key)
    return {"value": value - first, "interval": found, "leaves_zero_out": found is not None and found.is_sure}


def _change(difference: float, found: Interval | None, measure: Measure) -> dict[str, Any]:
    """A difference from the first run; `sure` where the interval leaves zero out."""
    return {
        "text": f"{difference:+.{measure.decimals}f}",
        "interval": _interval_text(found, measure.decimals, sign="+"),
        "sure": found is not None and found.is_sure,
        "better": (difference < 0) == measure.lower_is_better,
    }


def hero_card(measure: Measure, runs: Sequence[RunNumbers], intervals: Intervals) -> dict[str, Any]:
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
