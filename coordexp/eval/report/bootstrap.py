"""Bootstrap intervals over images: how much a number would move with another sample of images.

Images are drawn with replacement. A resample is a vector of weights (how often each image was drawn), so that F1
comes from one matrix product over per-image counts, and average precision from cumulative sums over the detections
sorted once. Runs share the resamples, so their differences are paired.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from coordexp.eval.calibration import NUM_SCORE_BINS, score_bins
from coordexp.eval.coco.annotations import Results
from coordexp.eval.coco.engine_input import engine_dataset, engine_results
from coordexp.eval.coco.evaluate import lvis_evaluator
from coordexp.eval.coco.federation import read_federation
from coordexp.eval.detection import scores_of
from coordexp.geometry import FloatArray, IntArray

LEVEL = 0.95
MAX_AP_WORK, MOST_AP_WORK = 100_000_000, 1_500_000_000
"""Detections x IoU thresholds that all resamples of AP may look at; and where that is not enough for an interval: some
7,000 images with 100 detections each."""
MIN_AP_RESAMPLES = 200
"""Fewer than this give no useful interval."""
_MOST_DETECTIONS = 100
_BLOCK = 50  # resamples at a time, which bounds memory


class Interval(NamedTuple):
    """The central 95 % of the resampled values."""

    low: float
    high: float

    @property
    def is_sure(self) -> bool:
        """Whether zero is outside, of an interval of differences."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class CategoryMatches:
    """COCO matches of one category, detections by descending score.

    image_D: image index;  tp_TD, fp_TD: at each IoU threshold (neither: ignored);  num_gt_N: objects per image.
    """

    image_D: IntArray
    tp_TD: NDArray[np.bool_]
    fp_TD: NDArray[np.bool_]
    num_gt_N: IntArray


def resample_indices(num_images: int, num_resamples: int, seed: int) -> IntArray:
    """Drawn images, int64 [num_resamples, num_images]."""
    return np.random.default_rng(seed).integers(num_images, size=(num_resamples, num_images))


def image_weights(indices_BN: IntArray) -> IntArray:
    """How often each image was drawn in each resample: int64 [B, N] -> int64 [B, N]."""
    num_resamples, num_images = indices_BN.shape
    offsets = np.arange(num_resamples)[:, None] * num_images
    counts = np.bincount((indices_BN + offsets).ravel(), minlength=num_resamples * num_images)
    return counts.reshape(num_resamples, num_images)


def resampled_f1(weights_BN: IntArray, counts_NT3: IntArray) -> dict[str, FloatArray]:
    """Micro precision, recall and F1 at the first threshold, F1 at the last and averaged over all of them. Each [B].

    counts_NT3: [images, thresholds, (tp, fp, fn)], thresholds IoU 0.50:0.05:0.95.
    """
    num_images, num_thresholds, _ = counts_NT3.shape
    flat = counts_NT3.reshape(num_images, -1)
    tp, fp, fn = np.moveaxis((weights_BN @ flat).reshape(-1, num_thresholds, 3), -1, 0).astype(np.float64)
    precision, recall, f1 = scores_of(tp, fp, fn)
    return {
        "f1_at_50": f1[:, 0],
        "f1_50_95": f1.mean(axis=1),
        "f1_at_95": f1[:, -1],
        "precision_at_50": precision[:, 0],
        "recall_at_50": recall[:, 0],
    }


def resampled_class_averaged_f1(
    weights_BN: IntArray, image_C: IntArray, label_C: IntArray, counts_CT3: IntArray
) -> FloatArray:
    """`class_averaged_f1` of every resample, mean over the thresholds.  [B]

    image_C, label_C, counts_CT3: as `DetectionSummary.counts_by_class` gives them.
    """
    num_resamples, num_thresholds = len(weights_BN), counts_CT3.shape[1]
    precision_BT, recall_BT, num_BT = np.zeros((3, num_resamples, num_thresholds))
    order = np.argsort(label_C, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(label_C[order])) + 1) if len(order) else []:
        weights_BC = weights_BN[:, image_C[rows]].astype(np.float64)
        totals = (weights_BC @ counts_CT3[rows].reshape(len(rows), -1)).reshape(num_resamples, -1, 3)
        tp, fp, fn = np.moveaxis(totals, -1, 0)
        precision, recall, _ = scores_of(tp, fp, fn)
        found = tp > 0
        precision_BT += precision * found
        recall_BT += recall * found
        num_BT += found
    precision_BT, recall_BT = (total / np.maximum(num_BT, 1) for total in (precision_BT, recall_BT))
    both_BT = precision_BT + recall_BT
    f1_BT = np.divide(2 * precision_BT * recall_BT, both_BT, out=np.zeros_like(both_BT), where=both_BT > 0)
    averaged: FloatArray = f1_BT.mean(axis=1)
    return averaged


def resampled_calibration_error(
    weights_BN: IntArray, scores_M: FloatArray, is_right_M: NDArray[np.bool_], image_M: IntArray
) -> FloatArray:
    """`calibration_error` of every resample; 0 where it holds no prediction.  [B]

    scores_M, is_right_M, image_M: of the predictions that count, and the rows of their images.
    """
    num_images = weights_BN.shape[1]
    cell_M = image_M * NUM_SCORE_BINS + score_bins(scores_M)
    gap_NK = np.bincount(cell_M, weights=is_right_M - scores_M, minlength=num_images * NUM_SCORE_BINS)
    num_B = weights_BN @ np.bincount(image_M, minlength=num_images)
    gap_B = np.abs(weights_BN @ gap_NK.reshape(num_images, NUM_SCORE_BINS)).sum(axis=1)
    error_B: FloatArray = np.divide(gap_B, num_B, out=np.zeros_like(gap_B), where=num_B > 0)
    return error_B


def coco_matches(results: Results) -> list[CategoryMatches]:
    """pycocotools' matches per category, in the order of the category ids; images are indexed by their sorted ids."""
    dataset = engine_dataset(results.dataset)
    detections = [
        {**pred, "id": i, "area": pred["bbox"][2] * pred["bbox"][3], "iscrowd": 0}
        for i, pred in enumerate(engine_results(results), start=1)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = COCO(), COCO()
        truth.dataset, found.dataset = dataset, {**dataset, "annotations": detections}
        truth.createIndex()
        found.createIndex()
        evaluator = COCOeval(truth, found, iouType="bbox")
        evaluator.params.areaRng, evaluator.params.areaRngLbl = evaluator.params.areaRng[:1], ["all"]
        evaluator.params.maxDets = [_MOST_DETECTIONS]
        evaluator.evaluate()
    num_images = len(evaluator.params.imgIds)
    per_category = [
        evaluator.evalImgs[start : start + num_images]
        for start in range(0, len(evaluator.evalImgs), num_images)
    ]
    num_thresholds = len(evaluator.params.iouThrs)
    return [_category_matches(images, num_thresholds) for images in per_category]


def lvis_matches(results: Results) -> list[CategoryMatches]:
    """The same by the rules of LVIS; RecordError for a data set that does not say what they need."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = lvis_evaluator(results.dataset, results, read_federation(results.dataset))
    image_rows = {image_id: row for row, image_id in enumerate(evaluator.params.imgIds)}
    category_rows = {category_id: row for row, category_id in enumerate(evaluator.params.catIds)}
    every_area = tuple(evaluator.params.areaRng[0])
    per_category: list[list[dict[str, Any] | None]] = [[None] * len(image_rows) for _ in category_rows]
    for found in evaluator.eval_imgs:
        if found is not None and tuple(found["aRng"]) == every_area:
            per_category[category_rows[found["category_id"]]][image_rows[found["image_id"]]] = found
    num_thresholds = len(evaluator.params.iouThrs)
    return [_category_matches(images, num_thresholds) for images in per_category]


def resampled_ap(weights_BN: IntArray, categories: Sequence[CategoryMatches]) -> dict[str, FloatArray]:
    """AP over IoU 0.50:0.05:0.95, AP50, AP75 and AR of every resample, each [B], by the rules of the matches.

    -1 where a number is not defined. An image drawn twice counts as two images whose detections stand beside each other
    in the ranking.
    """
    values_KBT, recall_KBT = np.full((2, len(categories), len(weights_BN), 10), np.nan)
    for k, category in enumerate(categories):
        if not category.num_gt_N.any():
            continue
        for start in range(0, len(weights_BN), _BLOCK):
            block = slice(start, start + _BLOCK)
            values_KBT[k, block] = _category_ap(weights_BN[block], category)
        recall_KBT[k] = _category_recall(weights_BN, category)
    return {
        "AP": _mean(values_KBT),
        "AP50": _mean(values_KBT[:, :, :1]),
        "AP75": _mean(values_KBT[:, :, 5:6]),
        "AR": _mean(recall_KBT),
    }


def affordable_resamples(num_resamples: int, num_detections: int, num_categories: int) -> int:
    """How many of the resamples AP can take in a few seconds, or as few as give an interval; 0: those take too long."""
    per_category = 60  # detections that the fixed work for a category costs as much as (measured)
    work = 10 * max(1, num_detections + per_category * num_categories)
    least = min(num_resamples, MIN_AP_RESAMPLES)
    if least * work > MOST_AP_WORK:
        return 0
    return max(least, min(num_resamples, MAX_AP_WORK // work))


def interval(values_B: FloatArray) -> Interval:
    """Percentile interval of resampled values."""
    low, high = np.quantile(values_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def _category_matches(images: Sequence[dict[str, Any] | None], num_thresholds: int) -> CategoryMatches:
    present = [(index, result) for index, result in enumerate(images) if result is not None]
    num_gt_N = np.zeros(len(images), dtype=np.int64)
    scores, image_D = [], []
    matched = [np.zeros((num_thresholds, 0))]
    ignored = [np.zeros((num_thresholds, 0), dtype=bool)]
    for index, result in present:
        num_gt_N[index] = np.count_nonzero(np.asarray(result["gtIgnore"]) == 0)
        scores += result["dtScores"]
        image_D += [index] * len(result["dtScores"])
        matched.append(np.asarray(result["dtMatches"]).reshape(num_thresholds, -1))
        ignored.append(np.asarray(result["dtIgnore"], dtype=bool).reshape(num_thresholds, -1))
    order = np.argsort(-np.array(scores, dtype=np.float64), kind="mergesort")
    is_matched = np.concatenate(matched, axis=1)[:, order] > 0
    is_counted = ~np.concatenate(ignored, axis=1)[:, order]
    return CategoryMatches(
        image_D=np.array(image_D, dtype=np.int64)[order],
        tp_TD=is_matched & is_counted,
        fp_TD=~is_matched & is_counted,
        num_gt_N=num_gt_N,
    )


def _category_recall(weights_BN: IntArray, category: CategoryMatches) -> FloatArray:
    """Recall of all detections of one category at every IoU threshold, NaN without an object.  [B, T]"""
    num_images, num_thresholds = weights_BN.shape[1], len(category.tp_TD)
    tp_NT = np.stack(
        [np.bincount(category.image_D[tp_D], minlength=num_images) for tp_D in category.tp_TD], axis=1
    )
    num_gt_B = (weights_BN @ category.num_gt_N)[:, None]
    unknown_BT = np.full((len(weights_BN), num_thresholds), np.nan)
    recall_BT: FloatArray = np.divide(weights_BN @ tp_NT, num_gt_B, out=unknown_BT, where=num_gt_B > 0)
    return recall_BT


def _category_ap(weights_BN: IntArray, category: CategoryMatches) -> FloatArray:
    """AP of one category at every IoU threshold, NaN where the resample holds none of its objects.  [B, T]"""
    recall_points = np.linspace(0.0, 1.0, 101)
    num_gt_B = weights_BN @ category.num_gt_N
    weights_BD = weights_BN[:, category.image_D]
    values_BT = np.full((len(weights_BN), len(category.tp_TD)), np.nan)
    for t, (tp_D, fp_D) in enumerate(zip(category.tp_TD, category.fp_TD, strict=True)):
        tp_BD = np.cumsum(weights_BD * tp_D, axis=1, dtype=np.float64)
        fp_BD = np.cumsum(weights_BD * fp_D, axis=1, dtype=np.float64)
        precision_BD = tp_BD / (tp_BD + fp_BD + np.spacing(1))
        envelope_BD = np.maximum.accumulate(precision_BD[:, ::-1], axis=1)[:, ::-1]
        # One column more: the precision of a recall that is never reached.
        envelope_BD = np.concatenate([envelope_BD, np.zeros((len(weights_BN), 1))], axis=1)
        for b in np.flatnonzero(num_gt_B):
            reached = np.searchsorted(tp_BD[b] / num_gt_B[b], recall_points, side="left")
            values_BT[b, t] = envelope_BD[b, reached].mean()
    return values_BT


def _mean(values_KBT: FloatArray) -> FloatArray:
    """Mean over defined categories and thresholds per resample; -1 where there is none."""
    defined = ~np.isnan(values_KBT)
    count_B = defined.sum(axis=(0, 2))
    total_B = np.where(defined, values_KBT, 0.0).sum(axis=(0, 2))
    mean_B: FloatArray = np.divide(total_B, count_B, out=np.full(count_B.shape, -1.0), where=count_B > 0)
    return mean_B
