"""The numbers of a report: those of `coordexp eval`, and per image, per class, per size and over confidence.

Everything that needs a match takes IoU 0.5 and equal descriptions, unless it says otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from coordexp.eval.coco.evaluate import CocoEvaluation, evaluate_coco, run_coco
from coordexp.eval.detection import (
    Counts,
    DetectionMetrics,
    DetectionSummary,
    Scores,
)
from coordexp.eval.report.data import XYXY, ReportImage, ReportRun
from coordexp.geometry import FloatArray, IntArray, box_areas, pairwise_iou, xyxy_to_xywh

MATCH_IOU = 0.5
SIZES = (("small", 0.0, 32.0**2), ("medium", 32.0**2, 96.0**2), ("large", 96.0**2, float("inf")))
"""COCO's size classes: name, smallest area, first area beyond (square pixels)."""


class ImageMatch(NamedTuple):
    """The matches of one image.

    pairs: (pred index, gt index, IoU).  ignored: unmatched predictions inside a crowd region, which count neither
    way.  scores: of the counts.
    """

    pairs: tuple[tuple[int, int, float], ...]
    ignored: frozenset[int]
    counts: Counts
    scores: Scores

    @property
    def mean_iou(self) -> float:
        """Mean IoU of the matched pairs, 0 without any."""
        return sum(iou for _, _, iou in self.pairs) / len(self.pairs) if self.pairs else 0.0


class ConfidenceCurve(NamedTuple):
    """Scores of the predictions at least as confident as each of the distinct confidences, descending. All [S]."""

    confidence: FloatArray
    precision: FloatArray
    recall: FloatArray
    f1: FloatArray

    @property
    def best(self) -> tuple[float, float] | None:
        """(confidence, F1) where F1 is highest; None without predictions."""
        if not len(self.f1):
            return None
        index = int(self.f1.argmax())
        return float(self.confidence[index]), float(self.f1[index])


class SizeRow(NamedTuple):
    """One size class. num_gt, found: by the object's area; num_pred, right: by the predicted box's area."""

    name: str
    num_gt: int
    found: int
    num_pred: int
    right: int
    average_precision: float | None
    average_recall: float | None


class ClassRow(NamedTuple):
    """One description. average_precision: None without ground truth."""

    name: str
    counts: Counts
    average_precision: float | None


@dataclass(frozen=True)
class RunNumbers:
    """All numbers of one run.

    counts_NT3, box_counts_NT3: int64 [images, IoU thresholds, (tp, fp, fn)], with and without looking at descs.
    constant_preds: the COCO results with every score 1.0.
    """

    run: ReportRun
    summary: DetectionSummary
    box_summary: DetectionSummary
    coco: CocoEvaluation
    ap_const: float
    constant_preds: list[dict[str, Any]]
    counts_NT3: IntArray
    box_counts_NT3: IntArray
    matches: tuple[ImageMatch, ...]
    confidence: ConfidenceCurve

    @property
    def headline(self) -> dict[str, float]:
        """The numbers of `metrics.json`, under its keys."""
        half = self.summary.at(MATCH_IOU)
        return {
            "AP": self.coco.metrics["AP"],
            "AP_const": self.ap_const,
            "f1_at_50": half.micro.f1,
            "f1_50_95": self.summary.mean_f1,
            "precision_at_50": half.micro.precision,
            "recall_at_50": half.micro.recall,
            "box_f1_at_50": self.box_summary.f1_at(MATCH_IOU),
            "box_f1_50_95": self.box_summary.mean_f1,
            **{key: value for key, value in self.coco.metrics.items() if key != "AP"},
            "num_images": len(self.run.images),
            "num_gt": sum(len(image.gt) for image in self.run.images),
            "num_pred": sum(len(image.pred) for image in self.run.images),
        }


def compute_numbers(run: ReportRun, *, engine: str = "pycocotools") -> RunNumbers:
    """Evaluate one run. engine: as for `coordexp eval`."""
    metrics, boxes_only = DetectionMetrics(), DetectionMetrics(class_aware=False)
    counts, box_counts, matches = [], [], []
    for image in run.images:
        found = metrics.update(*_sides(image))
        counts.append(found.counts)
        box_counts.append(boxes_only.update(*_sides(image)).counts)
        matches.append(_image_match(image, found.pairs[0], Counts(*found.counts[0].tolist())))
    constant = [{**pred, "score": 1.0} for pred in run.coco_preds]
    return RunNumbers(
        run=run,
        summary=metrics.compute(),
        box_summary=boxes_only.compute(),
        coco=run_coco(run.coco_gt, run.coco_preds, engine=engine),
        ap_const=evaluate_coco(run.coco_gt, constant, engine=engine)["AP"],
        constant_preds=constant,
        counts_NT3=np.stack(counts),
        box_counts_NT3=np.stack(box_counts),
        matches=tuple(matches),
        confidence=confidence_curve(run.images),
    )


def same_class_iou(image: ReportImage) -> FloatArray:
    """IoU of every prediction with every object, 0 where the descriptions differ.  float64 [P, G]."""
    iou_PG = pairwise_iou([pred.box_xyxy for pred in image.pred], [truth.box_xyxy for truth in image.gt])
    pred_descs = np.array([pred.desc for pred in image.pred], dtype=object)
    gt_descs = np.array([truth.desc for truth in image.gt], dtype=object)
    same_class: FloatArray = iou_PG * (pred_descs[:, None] == gt_descs[None, :])
    return same_class


def confidence_curve(images: Sequence[ReportImage]) -> ConfidenceCurve:
    """Precision, recall and F1 of the predictions kept at every confidence threshold.

    At each threshold the kept predictions are matched as `DetectionMetrics` does, so that the last point is the F1
    of all predictions.
    """
    steps = [step for image in images for step in _steps(image)]
    num_gt = sum(len(image.gt) for image in images)
    scores, hits, errors = (
        (np.array(column) for column in zip(*steps, strict=True)) if steps else np.zeros((3, 0))
    )
    descending = np.argsort(-scores, kind="stable")
    score_S = scores[descending]
    last_of_tie = np.append(score_S[1:] != score_S[:-1], True)[: len(score_S)]
    tp = np.cumsum(hits[descending])[last_of_tie]
    fp = np.cumsum(errors[descending])[last_of_tie]
    precision = np.divide(tp, tp + fp, out=np.ones(len(tp)), where=tp + fp > 0)
    recall = tp / num_gt if num_gt else np.ones(len(tp))
    f1 = np.divide(2.0 * tp, tp + fp + num_gt, out=np.zeros(len(tp)), where=precision + recall > 0)
    return ConfidenceCurve(score_S[last_of_tie], precision, recall, f1)


def size_rows(numbers: RunNumbers) -> list[SizeRow]:
    """Recall by the size of the objects and precision by the size of the predictions."""
    gt_area = [truth.area for image in numbers.run.images for truth in image.gt]
    pred_area = [float(box_areas(pred.box_xyxy)) for image in numbers.run.images for pred in image.pred]
    found, right, counted = [], [], []
    for image, match in zip(numbers.run.images, numbers.matches, strict=True):
        preds, gts = {p for p, _, _ in match.pairs}, {g for _, g, _ in match.pairs}
        found += [g in gts for g in range(len(image.gt))]
        right += [p in preds for p in range(len(image.pred))]
        counted += [p not in match.ignored for p in range(len(image.pred))]
    rows = []
    for name, low, high in SIZES:
        is_gt, is_pred = (
            _between(gt_area, low, high),
            _between(pred_area, low, high) & np.array(counted, dtype=bool),
        )
        rows.append(
            SizeRow(
                name=name,
                num_gt=int(is_gt.sum()),
                found=int(np.sum(found, where=is_gt)),
                num_pred=int(is_pred.sum()),
                right=int(np.sum(right, where=is_pred)),
                average_precision=defined(numbers.coco.metrics[f"AP_{name}"]),
                average_recall=defined(numbers.coco.metrics[f"AR_{name}"]),
            )
        )
    return rows


def class_rows(numbers: RunNumbers) -> list[ClassRow]:
    """Counts and AP of every description that is annotated or predicted; by objects annotated, then by name."""
    average_precision = numbers.coco.per_category_ap()
    rows = [
        ClassRow(desc, counts, average_precision.get(desc))
        for desc, counts in numbers.summary.at(MATCH_IOU).per_class.items()
    ]
    return sorted(rows, key=lambda row: (-(row.counts.tp + row.counts.fn), row.name))


def drop_reasons(run: ReportRun) -> Counter[str]:
    """What the parser and the scoring left out, by reason; most frequent first."""
    reasons: Counter[str] = Counter()
    for image in run.images:
        reasons.update(image.errors)
    return Counter(dict(reasons.most_common()))


def defined(value: float) -> float | None:
    """A COCO number; None for -1, which stands for "no ground truth"."""
    return None if value < 0 else value


def _sides(image: ReportImage) -> tuple[list[XYXY], list[str], list[XYXY], list[str], list[bool]]:
    """Predicted boxes and descs, annotated boxes and descs with whether they are crowd: for `DetectionMetrics`."""
    annotated = [*image.gt, *image.crowd]
    return (
        [pred.box_xyxy for pred in image.pred],
        [pred.desc for pred in image.pred],
        [truth.box_xyxy for truth in annotated],
        [truth.desc for truth in annotated],
        [False] * len(image.gt) + [True] * len(image.crowd),
    )


def _image_match(image: ReportImage, pairs: Sequence[tuple[int, int]], counts: Counts) -> ImageMatch:
    iou_PG = same_class_iou(image)
    matched = {p for p, _ in pairs}
    return ImageMatch(
        pairs=tuple((p, g, float(iou_PG[p, g])) for p, g in pairs),
        ignored=frozenset(p for p in _in_crowd(image) if p not in matched),
        counts=counts,
        scores=counts.scores,
    )


def _in_crowd(image: ReportImage) -> list[int]:
    """Predictions of which at least half lies inside a crowd region of their description (pycocotools' overlap)."""
    if not image.crowd or not image.pred:
        return []
    preds, regions = (xyxy_to_xywh([item.box_xyxy for item in items]) for items in (image.pred, image.crowd))
    share_PR = coco_mask.iou(preds, regions, [1] * len(image.crowd))
    return [
        p
        for p, pred in enumerate(image.pred)
        if any(
            share_PR[p, r] >= MATCH_IOU and region.desc == pred.desc for r, region in enumerate(image.crowd)
        )
    ]


def _steps(image: ReportImage) -> list[tuple[float, int, int]]:
    """(score, change of tp, change of fp) as the predictions are added from the most confident down.

    The largest one-to-one matching grows by one exactly where an augmenting path starts at the new prediction
    (Berge). With crowd regions it also matters which predictions stay unmatched: there every step is matched anew.
    """
    order = sorted(range(len(image.pred)), key=lambda p: -image.pred[p].score)
    if image.crowd:
        return _steps_with_crowd(image, order)
    feasible_PG = same_class_iou(image) >= MATCH_IOU
    owner: dict[int, int] = {}
    steps = []
    for p in order:
        hit = _augment(p, feasible_PG, owner, set())
        steps.append((image.pred[p].score, int(hit), int(not hit)))
    return steps


def _steps_with_crowd(image: ReportImage, order: Sequence[int]) -> list[tuple[float, int, int]]:
    boxes, descs, gt_boxes, gt_descs, gt_crowd = _sides(image)
    steps, tp, fp = [], 0, 0
    for count, p in enumerate(order, start=1):
        kept = order[:count]
        found = DetectionMetrics((MATCH_IOU,)).update(
            [boxes[k] for k in kept], [descs[k] for k in kept], gt_boxes, gt_descs, gt_crowd
        )
        new_tp, new_fp, _ = found.counts[0].tolist()
        steps.append((image.pred[p].score, new_tp - tp, new_fp - fp))
        tp, fp = new_tp, new_fp
    return steps


def _augment(p: int, feasible_PG: np.ndarray, owner: dict[int, int], seen: set[int]) -> bool:
    """Give prediction p an object, moving earlier predictions to others where that is needed (Kuhn)."""
    for g in np.flatnonzero(feasible_PG[p]).tolist():
        if g in seen:
            continue
        seen.add(g)
        if g not in owner or _augment(owner[g], feasible_PG, owner, seen):
            owner[g] = p
            return True
    return False


def _between(areas: Sequence[float], low: float, high: float) -> np.ndarray:
    values = np.array(areas, dtype=np.float64)
    return (values >= low) & (values < high)
