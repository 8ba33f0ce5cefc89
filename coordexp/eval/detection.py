"""Precision, recall and F1 of detections against ground truth, by one-to-one matching.

`DetectionMetrics` matches by box IoU at one or more thresholds and needs no scores; `MatchMetrics` sums up
the mask-IoU matches of `coordexp.matching` that rollout training works with. Both go update, compute, reset:

    metrics = DetectionMetrics()                                     # IoU 0.50:0.05:0.95, class-aware
    metrics.update(pred_boxes, pred_descs, gt_boxes, gt_descs)       # once per image
    metrics.compute().f1_at(0.5), metrics.compute().mean_f1

Empty sets: precision is 1 when nothing was predicted, recall is 1 when there was nothing to find.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment

from coordexp.errors import ConfigError, ContractError
from coordexp.geometry import FloatArray, IntArray, box_areas, pairwise_iou
from coordexp.matching import MatchResult

COCO_THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
"""IoU 0.50, 0.55, ..., 0.95."""

SCOPES = ("all", "annotated")


class Scores(NamedTuple):
    """Precision, recall and F1, each in [0, 1]."""

    precision: float
    recall: float
    f1: float


class Counts(NamedTuple):
    """True positives, false positives and false negatives."""

    tp: int
    fp: int
    fn: int

    @property
    def scores(self) -> Scores:
        """precision = tp / (tp + fp), recall = tp / (tp + fn), each 1 if 0 / 0; F1 their harmonic mean."""
        precision = self.tp / (self.tp + self.fp) if self.tp + self.fp else 1.0
        recall = self.tp / (self.tp + self.fn) if self.tp + self.fn else 1.0
        f1 = 2.0 * precision * recall / (precision + recall) if precision + recall else 0.0
        return Scores(precision, recall, f1)


@dataclass(frozen=True)
class ThresholdSummary:
    """Results at one IoU threshold.

    counts: over all images and classes.  micro: scores of these counts.
    macro_images: mean over images of each image's scores.
    macro_classes: mean of class scores over the classes that have ground truth (micro if none has).
    per_class: counts by desc, for every desc predicted or annotated.
    matched_iou_mean: mean box IoU of the true positives, None without any.
    """

    threshold: float
    counts: Counts
    micro: Scores
    macro_images: Scores
    macro_classes: Scores
    per_class: dict[str, Counts]
    matched_iou_mean: float | None


@dataclass(frozen=True)
class DetectionSummary:
    """Results at every threshold, ascending."""

    num_images: int
    by_threshold: list[ThresholdSummary]

    def at(self, threshold: float) -> ThresholdSummary:
        """The results at one of the thresholds that were evaluated; ContractError for any other."""
        for summary in self.by_threshold:
            if abs(summary.threshold - threshold) < 1e-9:
                return summary
        evaluated = ", ".join(str(summary.threshold) for summary in self.by_threshold)
        raise ContractError(f"IoU threshold {threshold} was not evaluated: expected one of {evaluated}")

    def f1_at(self, threshold: float) -> float:
        """Micro F1 at a threshold."""
        return self.at(threshold).micro.f1

    @property
    def mean_f1(self) -> float:
        """Micro F1 averaged over all evaluated thresholds (0.50:0.05:0.95 unless chosen otherwise)."""
        return float(np.mean([summary.micro.f1 for summary in self.by_threshold]))


@dataclass(frozen=True)
class ImageMatches:
    """What was counted for one image.

    counts: int64 [thresholds, (tp, fp, fn)].  pairs: at each threshold the (pred, gt) pairs, ascending by pred,
    as indices into the lists that `update` was given.
    """

    counts: IntArray
    pairs: list[list[tuple[int, int]]]


def match_at_threshold(iou_PG: FloatArray, threshold: float) -> list[tuple[int, int]]:
    """One-to-one pairs with IoU >= threshold: as many as possible, and among those the largest total IoU.

    iou_PG: float64 [P, G].  Returns (pred, gt) index pairs, ascending by pred.
    """
    feasible_PG = iou_PG >= threshold
    if not feasible_PG.any():
        return []
    if feasible_PG.sum(axis=0).max() == 1 and feasible_PG.sum(axis=1).max() == 1:
        rows, columns = np.nonzero(feasible_PG)  # nobody has a choice
        return list(zip(rows.tolist(), columns.tolist(), strict=True))
    one_more_pair = min(iou_PG.shape) + 1.0  # outweighs any total IoU
    rows, columns = linear_sum_assignment((one_more_pair + iou_PG) * feasible_PG, maximize=True)
    is_pair = feasible_PG[rows, columns]
    return list(zip(rows[is_pair].tolist(), columns[is_pair].tolist(), strict=True))


class DetectionMetrics:
    """Counts of matched boxes over images, at every IoU threshold at once.

    thresholds: IoU values in (0, 1].  class_aware: only boxes of equal desc can match; otherwise descs are
    ignored.  scope: "all" counts every prediction; "annotated" leaves out predictions whose desc the image's
    ground truth does not hold, for data sets that do not annotate everything.
    """

    def __init__(
        self,
        thresholds: Iterable[float] = COCO_THRESHOLDS,
        *,
        class_aware: bool = True,
        scope: str = "all",
    ) -> None:
        self.thresholds = tuple(sorted(float(threshold) for threshold in thresholds))
        self.class_aware = class_aware
        self.scope = scope
        if not self.thresholds or not all(0.0 < threshold <= 1.0 for threshold in self.thresholds):
            raise ConfigError(f"thresholds are {self.thresholds}: expected one or more IoU values in (0, 1]")
        if scope not in SCOPES:
            raise ConfigError(f"scope is {scope!r}: expected one of {', '.join(SCOPES)}")
        self.reset()

    def reset(self) -> None:
        """Forget every image."""
        self._num_images = 0
        self._class_counts: dict[str, np.ndarray] = {}  # desc -> int64 [thresholds, (tp, fp, fn)]
        self._image_scores = np.zeros((len(self.thresholds), 3))  # sums of (precision, recall, f1)
        self._iou_sums = np.zeros(len(self.thresholds))

    def update(
        self,
        pred_boxes_xyxy: ArrayLike,
        pred_descs: Sequence[str],
        gt_boxes_xyxy: ArrayLike,
        gt_descs: Sequence[str],
        gt_crowd: Sequence[bool] | None = None,
    ) -> ImageMatches:
        """Add one image.

        Boxes are [P, 4] and [G, 4] xyxy, both in pixels or both in bins (box IoU is the same in either up to
        quantisation); descs are their P and G descriptions.  gt_crowd: G flags; a crowd region is neither found
        nor missed, and an unmatched prediction of which the threshold's share lies inside one is not counted.
        """
        pred_boxes = _boxes(pred_boxes_xyxy, pred_descs, "pred")
        gt_boxes = _boxes(gt_boxes_xyxy, gt_descs, "gt")
        crowd = set(np.flatnonzero(gt_crowd).tolist()) if gt_crowd is not None else set()
        overlap_PG = pairwise_iou(pred_boxes, gt_boxes)
        if crowd:
            columns = sorted(crowd)
            overlap_PG[:, columns] = _share_inside(pred_boxes, gt_boxes[columns])
        annotated = set(gt_descs) if self.scope == "annotated" else None
        kept = [p for p, desc in enumerate(pred_descs) if annotated is None or desc in annotated]
        preds_by_class = self._by_class(pred_descs, kept)
        gts_by_class = self._by_class(gt_descs, [g for g in range(len(gt_descs)) if g not in crowd])
        crowds_by_class = self._by_class(gt_descs, sorted(crowd))
        image = ImageMatches(
            np.zeros((len(self.thresholds), 3), dtype=np.int64), [[] for _ in self.thresholds]
        )
        for desc in {**gts_by_class, **preds_by_class}:
            preds, gts = preds_by_class.get(desc, []), gts_by_class.get(desc, [])
            counts = self._count(overlap_PG, preds, gts, crowds_by_class.get(desc, []), image.pairs)
            self._class_counts[desc] = self._class_counts.get(desc, 0) + counts
            image.counts[:] += counts
        self._image_scores += [Counts(*row).scores for row in image.counts.tolist()]
        self._num_images += 1
        return ImageMatches(image.counts, [sorted(pairs) for pairs in image.pairs])

    def merge(self, other: DetectionMetrics) -> None:
        """Add the images that another accumulator with the same settings has seen (another rank's, say)."""
        mine = (self.thresholds, self.class_aware, self.scope)
        theirs = (other.thresholds, other.class_aware, other.scope)
        if mine != theirs:
            raise ContractError(f"cannot merge detection metrics with settings {theirs} into {mine}")
        for desc, counts in other._class_counts.items():
            self._class_counts[desc] = self._class_counts.get(desc, 0) + counts
        self._image_scores += other._image_scores
        self._iou_sums += other._iou_sums
        self._num_images += other._num_images

    def compute(self) -> DetectionSummary:
        """Results over the images so far; ContractError if there were none."""
        if not self._num_images:
            raise ContractError("no image was added to the detection metrics: call update() before compute()")
        summaries = [self._summary(index) for index in range(len(self.thresholds))]
        return DetectionSummary(self._num_images, summaries)

    def _by_class(self, descs: Sequence[str], indices: Sequence[int]) -> dict[str, list[int]]:
        groups: dict[str, list[int]] = {}
        for index in indices:
            groups.setdefault(descs[index] if self.class_aware else "any", []).append(index)
        return groups

    def _count(
        self,
        overlap_PG: FloatArray,
        preds: list[int],
        gts: list[int],
        crowds: list[int],
        pairs: list[list[tuple[int, int]]],
    ) -> IntArray:
        """(tp, fp, fn) at every threshold for the boxes of one class; its pairs are added to `pairs`."""
        counts = np.zeros((len(self.thresholds), 3), dtype=np.int64)
        counts[:, 1:] = len(preds), len(gts)
        if not preds or not (gts or crowds):
            return counts
        iou_PG = overlap_PG[np.ix_(preds, gts)]
        highest = iou_PG.max(initial=0.0)
        in_crowd_P = overlap_PG[np.ix_(preds, crowds)].max(axis=1, initial=0.0) if crowds else None
        for index, threshold in enumerate(self.thresholds):
            found = match_at_threshold(iou_PG, threshold) if highest >= threshold else []
            counts[index] += len(found), -len(found), -len(found)
            self._iou_sums[index] += sum(iou_PG[pair] for pair in found)
            pairs[index] += [(preds[p], gts[g]) for p, g in found]
            if in_crowd_P is not None:
                unmatched = np.delete(in_crowd_P, [p for p, _ in found])
                counts[index, 1] -= int((unmatched >= threshold).sum())
        return counts

    def _summary(self, index: int) -> ThresholdSummary:
        per_class = {
            desc: Counts(*counts[index].tolist()) for desc, counts in sorted(self._class_counts.items())
        }
        total = (
            Counts(*(sum(column) for column in zip(*per_class.values(), strict=True)))
            if per_class
            else Counts(0, 0, 0)
        )
        with_gt = [counts.scores for counts in per_class.values() if counts.tp + counts.fn]
        return ThresholdSummary(
            threshold=self.thresholds[index],
            counts=total,
            micro=total.scores,
            macro_images=Scores(*(self._image_scores[index] / self._num_images).tolist()),
            macro_classes=Scores(*np.mean(with_gt, axis=0).tolist()) if with_gt else total.scores,
            per_class=per_class,
            matched_iou_mean=float(self._iou_sums[index] / total.tp) if total.tp else None,
        )


class MatchMetrics:
    """Sums over the `MatchResult` of each image, and the ratios drawn from the sums."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget every image."""
        self.num_images = 0
        self.num_images_with_match = 0
        self.counts = Counts(0, 0, 0)
        self.maskiou_sum = 0.0
        self.num_candidates = 0
        self.gating_rejections = 0

    def update(self, match: MatchResult) -> None:
        """Add one image."""
        tp, fp, fn = self.counts
        num_matched = len(match.matched)
        self.num_images += 1
        self.num_images_with_match += bool(num_matched)
        self.counts = Counts(tp + num_matched, fp + len(match.unmatched_pred), fn + len(match.unmatched_gt))
        self.maskiou_sum += match.maskiou_sum
        self.num_candidates += match.num_candidates
        self.gating_rejections += match.gating_rejections

    def compute(self) -> Scores:
        """Precision, recall and F1 of matched objects over the images so far."""
        return self.counts.scores

    @property
    def matched_maskiou_mean(self) -> float | None:
        """Mean mask IoU over matched pairs, None without any."""
        return self.maskiou_sum / self.counts.tp if self.counts.tp else None

    @property
    def gating_rejection_rate(self) -> float | None:
        """Candidate pairs under the gate / candidate pairs, None without any."""
        return self.gating_rejections / self.num_candidates if self.num_candidates else None

    @property
    def sample_any_match_rate(self) -> float | None:
        """Images with at least one matched pair / images, None without any."""
        return self.num_images_with_match / self.num_images if self.num_images else None


def _boxes(boxes_xyxy: ArrayLike, descs: Sequence[str], side: str) -> FloatArray:
    boxes = np.asarray(boxes_xyxy, dtype=np.float64)
    if boxes.size != 4 * len(descs):
        raise ContractError(
            f"{side} boxes have shape {boxes.shape} for {len(descs)} descs: expected [{len(descs)}, 4]"
        )
    return boxes.reshape(-1, 4)


def _share_inside(boxes_N4: FloatArray, regions_M4: FloatArray) -> FloatArray:
    """Share of each box's area that lies inside each region.  [N, 4], [M, 4] xyxy -> float64 [N, M] in [0, 1]."""
    top_left = np.maximum(boxes_N4[:, None, :2], regions_M4[None, :, :2])
    bottom_right = np.minimum(boxes_N4[:, None, 2:], regions_M4[None, :, 2:])
    inside_NM = np.clip(bottom_right - top_left, 0.0, None).prod(axis=-1)
    areas_N1 = box_areas(boxes_N4)[:, None]
    share: FloatArray = np.divide(inside_NM, areas_N1, out=np.zeros_like(inside_NM), where=areas_N1 > 0)
    return share
