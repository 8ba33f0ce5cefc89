"""One-to-one matching of predicted and annotated boxes, of all images of a set at once.

Of all one-to-one pairs of an image that reach the threshold, as many as possible are taken, and among those the ones
with the largest total IoU. No scores are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from coordexp.errors import ContractError
from coordexp.eval.predictions.image_result import ImageResult, Objects
from coordexp.geometry import FloatArray, IntArray, box_areas

_PAIRS_AT_ONCE = 2_000_000  # of boxes that are compared, which bounds memory


@dataclass(frozen=True, eq=False)
class BoxSet:
    """The boxes of N images side by side, image after image: P predictions and G annotated objects.

    labels: distinct descriptions.  pred_label_P, gt_label_G: rows of `labels`.  pred_image_P, gt_image_G: rows of the
    image.  pred_starts_N, gt_starts_N: row of the first box of each image.
    """

    num_images: int
    labels: list[str]
    pred_image_P: IntArray
    pred_label_P: IntArray
    pred_boxes_P4: FloatArray
    pred_starts_N: IntArray
    gt_image_G: IntArray
    gt_label_G: IntArray
    gt_boxes_G4: FloatArray
    gt_starts_N: IntArray
    crowd_G: NDArray[np.bool_]

    @classmethod
    def of(cls, images: Sequence[ImageResult]) -> BoxSet:
        """The boxes of `images`; ContractError if there are none."""
        if not images:
            raise ContractError("there is no image to evaluate")
        rows: dict[str, int] = {}
        preds, gts = [image.pred for image in images], [image.gt for image in images]
        gt_label_G, pred_label_P = (_labels(side, rows) for side in (gts, preds))
        return cls(
            len(images),
            list(rows),
            *_columns(preds, pred_label_P),
            *_columns(gts, gt_label_G),
            np.concatenate([objects.crowd_N for objects in gts]),
        )

    def overlaps(self, least: float) -> tuple[IntArray, IntArray, FloatArray]:
        """(pred, gt, IoU) of all pairs of an image whose IoU is at least `least`. Each [M], ascending by pred, gt.

        Of a crowd region the overlap is the share of the prediction that lies inside it.
        """
        num_gt_N = np.bincount(self.gt_image_G, minlength=self.num_images)
        num_gt_P = num_gt_N[self.pred_image_P]
        total = np.cumsum(num_gt_P)
        found = []
        for first, stop in _blocks(total, _PAIRS_AT_ONCE):
            count = num_gt_P[first:stop]
            p = np.repeat(np.arange(first, stop), count)
            nth = np.arange(len(p)) - np.repeat(np.cumsum(count) - count, count)  # object of its image
            g = self.gt_starts_N[self.pred_image_P[p]] + nth
            overlap = _overlap(self.pred_boxes_P4[p], self.gt_boxes_G4[g], self.crowd_G[g])
            kept = overlap >= least
            found.append((p[kept], g[kept], overlap[kept]))
        if not found:
            return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
        p, g, overlap = (np.concatenate(column) for column in zip(*found, strict=True))
        return p, g, overlap


class Pairs(NamedTuple):
    """Matched pairs. Pair m holds at the thresholds with index from start_M[m] up to, not including, stop_M[m]."""

    image_M: IntArray
    pred_M: IntArray
    gt_M: IntArray
    iou_M: FloatArray
    start_M: IntArray
    stop_M: IntArray

    def at(self, index: int) -> Iterable[tuple[int, int, int, float]]:
        """(image, pred, gt, IoU) of the pairs at a threshold, ascending by pred."""
        held = (self.start_M <= index) & (index < self.stop_M)
        return zip(*(column[held].tolist() for column in self[:4]), strict=True)


class Ignored(NamedTuple):
    """Predictions inside a crowd region, and at which thresholds they are left out: bool [M, thresholds]."""

    image_M: IntArray
    pred_M: IntArray
    is_ignored_MT: NDArray[np.bool_]

    def at(self, index: int) -> Iterable[tuple[int, int]]:
        """(image, pred) of those left out at a threshold."""
        left_out = self.is_ignored_MT[:, index]
        return zip(self.image_M[left_out].tolist(), self.pred_M[left_out].tolist(), strict=True)


def match_at_threshold(iou_PG: FloatArray, threshold: float) -> list[tuple[int, int]]:
    """One-to-one pairs with IoU >= threshold: as many as possible, and among those the largest total IoU.

    iou_PG: float64 [P, G].  Returns (pred, gt) index pairs, ascending by pred.
    """
    feasible_PG = iou_PG >= threshold
    if not feasible_PG.any():
        return []
    one_more_pair = min(iou_PG.shape) + 1.0  # outweighs any total IoU
    rows, columns = linear_sum_assignment((one_more_pair + iou_PG) * feasible_PG, maximize=True)
    is_pair = feasible_PG[rows, columns]
    return list(zip(rows[is_pair].tolist(), columns[is_pair].tolist(), strict=True))


def matched_pairs(
    p: IntArray, g: IntArray, iou: FloatArray, pred_image_P: IntArray, thresholds: Sequence[float]
) -> Pairs:
    """The matching at every threshold, from all pairs that reach the lowest.

    Where predictions reach one object each, the best of them gets it, at every threshold up to its IoU; the same where
    objects are reached by one prediction each. Only what is left needs an assignment problem, per image and threshold.
    """
    p_has_choice, g_has_choice = (np.bincount(side)[side] > 1 for side in (p, g))
    by_object = ~_any_of(g, p_has_choice)[g]
    by_prediction = ~by_object & ~_any_of(p, g_has_choice)[p]
    left = np.flatnonzero(~by_object & ~by_prediction)
    rows = np.concatenate([_best(g, iou, p, by_object), _best(p, iou, g, by_prediction)])
    found = [(rows, np.zeros(len(rows), np.int64), np.searchsorted(thresholds, iou[rows], side="right"))]
    starts = np.flatnonzero(np.diff(pred_image_P[p[left]], prepend=-1))
    for group in np.split(left, starts[1:]) if len(left) else []:
        found += _assigned(group, p, g, iou, thresholds)
    row, start, stop = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(p[row], kind="stable")
    row = row[order]
    return Pairs(pred_image_P[p[row]], p[row], g[row], iou[row], start[order], stop[order])


def _best(center: IntArray, iou: FloatArray, partner: IntArray, mask: NDArray[np.bool_]) -> IntArray:
    """Of the pairs in `mask`, the one with the highest IoU of every center (ties: the first partner)."""
    rows = np.flatnonzero(mask)
    rows = rows[np.lexsort((partner[rows], -iou[rows], center[rows]))]
    best: IntArray = rows[np.flatnonzero(np.diff(center[rows], prepend=-1))]
    return best


def _assigned(
    group: IntArray, p: IntArray, g: IntArray, iou: FloatArray, thresholds: Sequence[float]
) -> list[tuple[IntArray, IntArray, IntArray]]:
    """Assignment among the pairs `group` of one image: (rows, start, stop) per threshold."""
    preds, row_of = np.unique(p[group], return_inverse=True)
    gts, column_of = np.unique(g[group], return_inverse=True)
    iou_PG = np.zeros((len(preds), len(gts)))
    iou_PG[row_of, column_of] = iou[group]
    pair_PG = np.zeros(iou_PG.shape, dtype=np.int64)
    pair_PG[row_of, column_of] = group
    found = []
    for index, threshold in enumerate(thresholds):
        rows = np.array([pair_PG[pair] for pair in match_at_threshold(iou_PG, threshold)], dtype=np.int64)
        found.append((rows, np.full(len(rows), index), np.full(len(rows), index + 1)))
    return found


def ignored_predictions(
    p: IntArray, share: FloatArray, pred_image_P: IntArray, pairs: Pairs, thresholds: Sequence[float]
) -> Ignored:
    """Unmatched predictions of which the threshold's share lies inside a crowd region."""
    preds, row_of = np.unique(p, return_inverse=True)
    largest = np.zeros(len(preds))
    np.maximum.at(largest, row_of, share)
    is_ignored = largest[:, None] >= np.array(thresholds)
    row = np.searchsorted(preds, pairs.pred_M)
    for index in np.flatnonzero(np.isin(pairs.pred_M, preds)).tolist():
        is_ignored[row[index], pairs.start_M[index] : pairs.stop_M[index]] = False
    return Ignored(pred_image_P[preds], preds, is_ignored)


def _labels(sides: Sequence[Objects], rows: dict[str, int]) -> IntArray:
    """The row of every description; new ones are added to `rows`."""
    descs = chain.from_iterable(objects.descs for objects in sides)
    return np.array([rows.setdefault(desc, len(rows)) for desc in descs], dtype=np.int64)


def _columns(sides: Sequence[Objects], label_M: IntArray) -> tuple[IntArray, IntArray, FloatArray, IntArray]:
    """Row of the image, label, box and, per image, row of the first box."""
    counts_N = np.array([len(objects) for objects in sides])
    image_M = np.repeat(np.arange(len(sides)), counts_N)
    return (
        image_M,
        label_M,
        np.concatenate([objects.boxes_N4 for objects in sides]),
        np.cumsum(counts_N) - counts_N,
    )


def _blocks(total: IntArray, most: int) -> Iterator[tuple[int, int]]:
    """Stretches (first, stop) of rows over which a running total grows by at most `most` (or single rows)."""
    first = 0
    while first < len(total):
        before = int(total[first - 1]) if first else 0
        stop = max(first + 1, int(np.searchsorted(total, before + most, side="right")))
        yield first, stop
        first = stop


def _overlap(preds_M4: FloatArray, gts_M4: FloatArray, crowd_M: NDArray[np.bool_]) -> FloatArray:
    """IoU of each prediction with its object; the share of the prediction that lies inside a crowd region.  [M]"""
    top_left = np.maximum(preds_M4[:, :2], gts_M4[:, :2])
    sides = np.clip(np.minimum(preds_M4[:, 2:], gts_M4[:, 2:]) - top_left, 0.0, None)
    shared, areas = sides[:, 0] * sides[:, 1], box_areas(preds_M4)
    whole = np.where(crowd_M, areas, areas + box_areas(gts_M4) - shared)
    overlap: FloatArray = np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)
    return overlap


def _any_of(index_M: IntArray, flag_M: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """For every value of the index, whether any of its entries is flagged."""
    return np.bincount(index_M, weights=flag_M) > 0
