"""Precision, recall and F1 of detections against ground truth, by one-to-one matching of boxes.

    boxes = BoxSet.of(images)
    summary = match_boxes(boxes)                              # IoU 0.50:0.05:0.95, descriptions must be equal
    summary.f1_at(0.5), summary.f1_50_95
    match_boxes(boxes, class_aware=False)                     # boxes alone

Empty sets: precision is 1 when nothing was predicted, recall is 1 when there was nothing to find. `scores_of` is the
one place where precision, recall and F1 come from counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coordexp.errors import ConfigError, ContractError
from coordexp.eval.box_matching import BoxSet, Ignored, Pairs, ignored_predictions, matched_pairs
from coordexp.geometry import FloatArray, IntArray

COCO_THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
"""IoU 0.50, 0.55, ..., 0.95."""

SCOPES = ("all", "annotated")
ANY_CLASS = "any"


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

    @classmethod
    def of(cls, num_matched: float, num_pred: float, num_gt: float) -> Counts:
        """From how many objects were matched, predicted and there."""
        return cls(int(num_matched), int(num_pred - num_matched), int(num_gt - num_matched))

    @property
    def scores(self) -> Scores:
        """See `scores_of`."""
        return Scores(*(float(value) for value in scores_of(*self)))

    @property
    def ratios(self) -> tuple[tuple[float, float], tuple[float, float], tuple[float, float]]:
        """Numerator and denominator of precision, recall and F1, which add up over images, steps and ranks."""
        tp, fp, fn = map(float, self)
        return (tp, tp + fp), (tp, tp + fn), (2.0 * tp, 2.0 * tp + fp + fn)


def scores_of(tp: ArrayLike, fp: ArrayLike, fn: ArrayLike) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Precision, recall and F1 of counts of one shape, 1 for 0 / 0.

    tp / (tp + fp), tp / (tp + fn), and 2 tp / (2 tp + fp + fn), which is their harmonic mean.
    """
    tp, fp, fn = (np.asarray(count, dtype=np.float64) for count in (tp, fp, fn))
    return _ratio(tp, tp + fp), _ratio(tp, tp + fn), _ratio(2.0 * tp, 2.0 * tp + fp + fn)


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


def class_averaged_f1(at: ThresholdSummary) -> float:
    """F1 of the mean precision and the mean recall over annotated classes, classes with 0 left out of either mean.

    Of all predictions, whatever their scores (the end of the precision-recall curve). Leaving out zeros flatters; it is
    here for comparison with tables that are made so.
    """
    found = [
        counts.scores for counts in at.per_class.values() if counts.tp
    ]  # neither is 0 where there is a match
    if not found:
        return 0.0
    precision = sum(scores.precision for scores in found) / len(found)
    recall = sum(scores.recall for scores in found) / len(found)
    return 2 * precision * recall / (precision + recall)


class ImageMatch(NamedTuple):
    """The matches of one image at one threshold.

    pairs: (pred, gt, IoU), ascending by pred.  ignored: unmatched predictions inside a crowd region, which count
    neither way.  counts: of the image.
    """

    pairs: tuple[tuple[int, int, float], ...]
    ignored: frozenset[int]
    counts: Counts

    @property
    def scores(self) -> Scores:
        """Of the counts."""
        return self.counts.scores

    @property
    def mean_iou(self) -> float:
        """Mean IoU of the matched pairs, 0 without any."""
        return sum(iou for _, _, iou in self.pairs) / len(self.pairs) if self.pairs else 0.0


@dataclass(frozen=True, eq=False)
class DetectionSummary:
    """Results at every threshold, ascending.

    counts_NT3: int64 [images, thresholds, (tp, fp, fn)].
    """

    thresholds: tuple[float, ...]
    by_threshold: list[ThresholdSummary]
    counts_NT3: IntArray
    _boxes: BoxSet
    _pairs: Pairs
    _ignored: Ignored
    _kept_P: NDArray[np.bool_]

    @property
    def num_images(self) -> int:
        """Images that were evaluated."""
        return len(self.counts_NT3)

    def at(self, threshold: float) -> ThresholdSummary:
        """The results at one of the thresholds that were evaluated; ContractError for any other."""
        return self.by_threshold[self._index(threshold)]

    def f1_at(self, threshold: float) -> float:
        """Micro F1 at a threshold."""
        return self.at(threshold).micro.f1

    @property
    def f1_50_95(self) -> float:
        """Micro F1 averaged over IoU 0.50:0.05:0.95, whatever else was evaluated."""
        return sum(map(self.f1_at, COCO_THRESHOLDS)) / len(COCO_THRESHOLDS)

    def matches(self, threshold: float) -> list[ImageMatch]:
        """Who was matched with whom in every image; indices are those of its `pred` and `gt`."""
        index = self._index(threshold)
        pred_starts, gt_starts = self._boxes.pred_starts_N.tolist(), self._boxes.gt_starts_N.tolist()
        pairs: list[list[tuple[int, int, float]]] = [[] for _ in range(self.num_images)]
        for n, p, g, iou in self._pairs.at(index):
            pairs[n].append((p - pred_starts[n], g - gt_starts[n], iou))
        ignored: list[list[int]] = [[] for _ in range(self.num_images)]
        for n, p in self._ignored.at(index):
            ignored[n].append(p - pred_starts[n])
        counts = self.counts_NT3[:, index].tolist()
        return [
            ImageMatch(tuple(found), frozenset(left_out), Counts(*row))
            for found, left_out, row in zip(pairs, ignored, counts, strict=True)
        ]

    def counts_by_class(self) -> tuple[IntArray, IntArray, IntArray]:
        """Counts of every description in every image that holds or predicts it.

        Rows of the images [C], numbers of the descriptions [C], and int64 [C, thresholds, (tp, fp, fn)].
        """
        boxes, pairs, ignored = self._boxes, self._pairs, self._ignored
        num_labels = len(boxes.labels)
        pred_key_P = boxes.pred_image_P * num_labels + boxes.pred_label_P
        gt_key_G = boxes.gt_image_G * num_labels + boxes.gt_label_G
        kept_P, counted_G = self._kept_P, ~boxes.crowd_G
        key_C = np.unique(np.concatenate([pred_key_P[kept_P], gt_key_G[counted_G]]))
        pair_row, ignored_row, pred_row, gt_row = (
            np.searchsorted(key_C, keys)
            for keys in (
                gt_key_G[pairs.gt_M], pred_key_P[ignored.pred_M], pred_key_P[kept_P], gt_key_G[counted_G]
            )
        )  # fmt: skip
        counts_CT3 = _counts(
            len(key_C), pairs, ignored, pair_row, ignored_row, pred_row, gt_row, len(self.thresholds)
        )
        return key_C // num_labels, key_C % num_labels, counts_CT3

    def right_predictions(self, threshold: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_], IntArray]:
        """Of every prediction, image after image: whether it is matched, whether it counts, and its image's row. [P]"""
        index = self._index(threshold)
        pairs, ignored = self._pairs, self._ignored
        is_right_P = np.zeros_like(self._kept_P)
        is_right_P[pairs.pred_M[(pairs.start_M <= index) & (index < pairs.stop_M)]] = True
        counts_P = self._kept_P.copy()
        counts_P[ignored.pred_M[ignored.is_ignored_MT[:, index]]] = False
        return is_right_P, counts_P, self._boxes.pred_image_P

    def _index(self, threshold: float) -> int:
        for index, evaluated in enumerate(self.thresholds):
            if abs(evaluated - threshold) < 1e-9:
                return index
        listed = ", ".join(map(str, self.thresholds))
        raise ContractError(f"IoU threshold {threshold} was not evaluated: expected one of {listed}")


def match_boxes(
    boxes: BoxSet,
    thresholds: Iterable[float] = COCO_THRESHOLDS,
    *,
    class_aware: bool = True,
    scope: str = "all",
) -> DetectionSummary:
    """Match the predictions of every image with its objects, at every IoU threshold.

    thresholds: IoU values in (0, 1].  class_aware: only boxes of equal desc can match; otherwise descs are
    ignored.  scope: "all" counts every prediction; "annotated" leaves out predictions whose desc the image's
    ground truth does not hold, for data sets that do not annotate everything.
    """
    thresholds = tuple(sorted(float(threshold) for threshold in thresholds))
    if not thresholds or not all(0.0 < threshold <= 1.0 for threshold in thresholds):
        raise ConfigError(f"thresholds are {thresholds}: expected one or more IoU values in (0, 1]")
    if scope not in SCOPES:
        raise ConfigError(f"scope is {scope!r}: expected one of {', '.join(SCOPES)}")
    p, g, overlap = boxes.overlaps(thresholds[0])
    kept_P = np.ones(len(boxes.pred_image_P), dtype=bool) if scope == "all" else _annotated(boxes)
    possible = kept_P[p]
    if class_aware:
        possible &= boxes.pred_label_P[p] == boxes.gt_label_G[g]
    is_crowd = boxes.crowd_G[g]
    regular, in_crowd = possible & ~is_crowd, possible & is_crowd
    pairs = matched_pairs(p[regular], g[regular], overlap[regular], boxes.pred_image_P, thresholds)
    ignored = ignored_predictions(p[in_crowd], overlap[in_crowd], boxes.pred_image_P, pairs, thresholds)
    return _summary(boxes, thresholds, kept_P, pairs, ignored, class_aware)


def _summary(
    boxes: BoxSet,
    thresholds: tuple[float, ...],
    kept_P: NDArray[np.bool_],
    pairs: Pairs,
    ignored: Ignored,
    class_aware: bool,
) -> DetectionSummary:
    labels = boxes.labels if class_aware else [ANY_CLASS]
    pred_label_P, gt_label_G = boxes.pred_label_P, boxes.gt_label_G
    if not class_aware:
        pred_label_P, gt_label_G = np.zeros_like(pred_label_P), np.zeros_like(gt_label_G)
    counted_G = ~boxes.crowd_G
    counts_NT3 = _counts(
        boxes.num_images, pairs, ignored, pairs.image_M, ignored.image_M, boxes.pred_image_P[kept_P],
        boxes.gt_image_G[counted_G], len(thresholds),
    )  # fmt: skip
    counts_KT3 = _counts(
        len(labels), pairs, ignored, gt_label_G[pairs.gt_M], pred_label_P[ignored.pred_M], pred_label_P[kept_P],
        gt_label_G[counted_G], len(thresholds),
    )  # fmt: skip
    seen = sorted({*pred_label_P[kept_P].tolist(), *gt_label_G[counted_G].tolist()}, key=labels.__getitem__)
    counts_KT3 = counts_KT3[seen]
    iou_sums_T = _over_thresholds(pairs, np.zeros_like(pairs.gt_M), pairs.iou_M, 1, len(thresholds))[0]
    by_threshold = [
        _threshold_summary(
            threshold, counts_NT3[:, t], counts_KT3[:, t], [labels[k] for k in seen], float(iou_sums_T[t])
        )
        for t, threshold in enumerate(thresholds)
    ]
    return DetectionSummary(thresholds, by_threshold, counts_NT3, boxes, pairs, ignored, kept_P)


def _threshold_summary(
    threshold: float, counts_N3: IntArray, counts_K3: IntArray, labels: Sequence[str], iou_sum: float
) -> ThresholdSummary:
    total = Counts(*counts_N3.sum(axis=0).tolist())
    annotated_K3 = counts_K3[counts_K3[:, 0] + counts_K3[:, 2] > 0]
    return ThresholdSummary(
        threshold=threshold,
        counts=total,
        micro=total.scores,
        macro_images=_mean_scores(counts_N3),
        macro_classes=_mean_scores(annotated_K3) if len(annotated_K3) else total.scores,
        per_class={label: Counts(*row) for label, row in zip(labels, counts_K3.tolist(), strict=True)},
        matched_iou_mean=iou_sum / total.tp if total.tp else None,
    )


def _mean_scores(counts_M3: IntArray) -> Scores:
    return Scores(*(float(values_M.mean()) for values_M in scores_of(*counts_M3.T)))


def _counts(
    size: int,
    pairs: Pairs,
    ignored: Ignored,
    pair_row: IntArray,
    ignored_row: IntArray,
    pred_row: IntArray,
    gt_row: IntArray,
    num_thresholds: int,
) -> IntArray:
    """int64 [size, thresholds, (tp, fp, fn)]; the rows say which image (or class) each thing belongs to."""
    tp = _over_thresholds(pairs, pair_row, np.ones_like(pair_row), size, num_thresholds)
    left_out = np.zeros_like(tp)
    np.add.at(left_out, ignored_row, ignored.is_ignored_MT)
    num_pred, num_gt = (np.bincount(row, minlength=size)[:, None] for row in (pred_row, gt_row))
    return np.stack([tp, num_pred - tp - left_out, num_gt - tp], axis=-1)


def _over_thresholds(
    pairs: Pairs, row_M: IntArray, values_M: NDArray[Any], size: int, num_thresholds: int
) -> NDArray[Any]:
    """Sums of the values of the pairs that hold at each threshold, by row.  [size, thresholds]"""
    changes = np.zeros((size, num_thresholds + 1), dtype=values_M.dtype)
    np.add.at(changes, (row_M, pairs.start_M), values_M)
    np.subtract.at(changes, (row_M, pairs.stop_M), values_M)
    return np.cumsum(changes, axis=1)[:, :-1]


def _annotated(boxes: BoxSet) -> NDArray[np.bool_]:
    """Which predictions are of a description that the ground truth of their image holds."""
    num_labels = len(boxes.labels)
    pred_key_P = boxes.pred_image_P * num_labels + boxes.pred_label_P
    return np.isin(pred_key_P, boxes.gt_image_G * num_labels + boxes.gt_label_G)


def _ratio(part: FloatArray, whole: FloatArray) -> FloatArray:
    """part / whole, 1 for 0 / 0."""
    return np.divide(part, whole, out=np.ones_like(whole), where=whole > 0)
