"""The tables of an evaluation: by image, by class, by size, and the curves; and writing them."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coordexp.eval.coco.evaluate import CocoEvaluation, defined
from coordexp.eval.coco.sizes import SIZES, size_classes
from coordexp.eval.detection import Counts, DetectionSummary, ImageMatch, ThresholdSummary
from coordexp.eval.predictions.image_result import ImageResult
from coordexp.files import atomic_file
from coordexp.geometry import FloatArray

PER_CLASS_COLUMNS = (
    "desc",
    "num_gt",
    "num_pred",
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR",  # at the highest detection limit
    "tp",  # from here on at IoU 0.50, by one-to-one matching
    "fp",
    "fn",
    "precision",
    "recall",
    "f1",
)


def threshold_row(summary: ThresholdSummary) -> dict[str, Any]:
    """One IoU threshold of the F1 table."""
    return {
        "iou": summary.threshold,
        **summary.counts._asdict(),
        **summary.micro._asdict(),
        "macro_images": summary.macro_images._asdict(),
        "macro_classes": summary.macro_classes._asdict(),
        "matched_iou_mean": summary.matched_iou_mean,
    }


def image_rows(images: Sequence[ImageResult], summary: DetectionSummary) -> list[dict[str, Any]]:
    """The images of per_image.json.

    counts: [tp, fp, fn] at every threshold of metrics.json's `f1_by_iou`; tp, fp, fn, precision, recall, f1 and
    `matched` (the index of the partner, None without one) are at IoU 0.50.
    """
    return [
        _image_row(image, match, counts)
        for image, match, counts in zip(
            images, summary.matches(0.5), summary.counts_NT3.tolist(), strict=True
        )
    ]


def _image_row(image: ImageResult, match: ImageMatch, counts: list[list[int]]) -> dict[str, Any]:
    gt_of = {p: g for p, g, _ in match.pairs}
    pred_of = {g: p for p, g, _ in match.pairs}
    gt, pred = image.gt.rows(scored=False), image.pred.rows(scored=True)
    return {
        "image_id": image.image_id,
        "image": image.file_name,
        "width": image.width or None,
        "height": image.height or None,
        **match.counts._asdict(),
        **match.scores._asdict(),
        "counts": counts,
        "gt": [row | {"matched": pred_of.get(index)} for index, row in enumerate(gt)],
        "pred": [row | {"matched": gt_of.get(index)} for index, row in enumerate(pred)],
        "errors": dict(image.errors),
    }


def class_rows(
    evaluation: CocoEvaluation, summary: DetectionSummary, num_pred: Counter[str]
) -> list[dict[str, Any]]:
    """Rows of per_class.csv, by description; a number that cannot be measured is None."""
    per_category = evaluation.per_category()
    counts_of = summary.at(0.5).per_class
    rows = []
    for desc in sorted({*evaluation.category_names, *counts_of}):
        coco = per_category.get(desc, {})
        counts = counts_of.get(desc, Counts(0, 0, 0))
        scores = counts.scores._asdict() if any(counts) else {}
        numbers = {**coco, "AR": coco.get(f"AR{evaluation.max_dets[-1]}"), **counts._asdict(), **scores}
        row = {
            "desc": desc, "num_gt": counts.tp + counts.fn, "num_pred": num_pred[desc],
            **{name: defined(numbers.get(name)) for name in PER_CLASS_COLUMNS[3:]},
        }  # fmt: skip
        rows.append(row)
    return rows


def size_table(evaluation: CocoEvaluation, area_M: FloatArray) -> dict[str, Any]:
    """Ground-truth objects (no crowds), AP and AR by COCO's size classes of ground-truth area.

    area_M: square pixels of the objects.
    """
    counts = np.bincount(size_classes(area_M), minlength=len(SIZES)).tolist()
    metrics = evaluation.metrics
    return {
        size: {"num_gt": count, "AP": metrics[f"AP_{size}"], "AR": metrics[f"AR_{size}"]}
        for size, count in zip(SIZES, counts, strict=True)
    }


def pr_curves(evaluation: CocoEvaluation) -> dict[str, list[float]]:
    """Precision at the 101 recall points, mean over classes: at IoU 0.50, at 0.75, and over 0.50:0.05:0.95."""
    return {
        "recall": evaluation.recall_points.tolist(),
        "precision_at_50": evaluation.pr_curve(0.5),
        "precision_at_75": evaluation.pr_curve(0.75),
        "precision_50_95": evaluation.pr_curve(),
    }


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """A CSV file; None becomes an empty cell."""
    with atomic_file(path) as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
