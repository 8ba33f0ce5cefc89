"""What each kind of error costs in average precision (TIDE: Bolya et al. 2020, arXiv 2008.08115).

    tide = tide_errors(images)
    tide.ap, tide.cost[ErrorKind.LOCALISATION], tide.cost_of_false_positives

Predictions are matched with annotated objects at IoU 0.5; every prediction without a partner is an error of one kind,
and so is every object that no such error could have found. The cost of a kind is how much AP would rise if an oracle
mended its errors, one kind at a time: costs do not add up to what is missing from 1.

This follows the tidecv package step by step, and a test holds it to that. The package itself is not used: it has had
no release since 2020, and imports opencv, pandas, seaborn and matplotlib. Its AP differs from COCO's in one thing: a
class that is predicted but annotated nowhere counts as a class with an AP of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from coordexp.eval.errors.crowds import share_in_crowd
from coordexp.eval.predictions.image_result import ImageResult, Objects
from coordexp.geometry import FloatArray, IntArray, pairwise_iou

IOU, BACKGROUND_IOU = 0.5, 0.1
MAX_DETS = 100

BoolArray = NDArray[np.bool_]


class ErrorKind(StrEnum):
    """Kinds in the order of the paper. All but the last are of predictions.

    CLASS: on an object of another description.  LOCALISATION: on one of its own, with an IoU of 0.1 to 0.5.
    BOTH: none of the other kinds.  DUPLICATE: on an object that a more confident prediction has taken.
    BACKGROUND: on nothing (IoU of at most 0.1).  MISSED: an object that no error of the first two kinds is about.
    """

    CLASS = "Cls"
    LOCALISATION = "Loc"
    BOTH = "Cls+Loc"
    DUPLICATE = "Duplicate"
    BACKGROUND = "Background"
    MISSED = "Missed"


@dataclass(frozen=True)
class TideErrors:
    """ap, cost: fractions of 1.  count: errors of each kind.  images: rows of the images that hold some, ascending.

    cost_of_false_positives: what AP would gain if no prediction were wrong;  cost_of_false_negatives: if only what was
    found had been annotated. Both overlap with the kinds.
    """

    ap: float
    cost: dict[ErrorKind, float]
    count: dict[ErrorKind, int]
    images: dict[ErrorKind, list[int]]
    cost_of_false_positives: float
    cost_of_false_negatives: float


class _Predictions(NamedTuple):
    """Predictions of all images, image after image by descending score. All [P].

    kind: place of the error among the kinds, -1 of a right one.  fixed: what an oracle would name it, -1 where mending
    takes it away.  counts: False of those in a crowd region.
    """

    image: IntArray
    label: IntArray
    score: FloatArray
    right: BoolArray
    counts: BoolArray
    kind: IntArray
    fixed: IntArray


class _Truths(NamedTuple):
    """Annotated objects, no crowds. All [G].  missed: neither found nor the object of an error that could be mended."""

    image: IntArray
    label: IntArray
    found: BoolArray
    missed: BoolArray


_KINDS = list(ErrorKind)


def tide_errors(
    images: Sequence[ImageResult],
    *,
    iou: float = IOU,
    background_iou: float = BACKGROUND_IOU,
    max_dets: int = MAX_DETS,
) -> TideErrors | None:
    """Errors of all predictions, the `max_dets` most confident of an image; None where nothing is annotated.

    iou: from which on a box is on an object.  background_iou: up to which it is on none.
    """
    labels: dict[str, int] = {}
    columns = [
        _image_columns(n, image, labels, iou, background_iou, max_dets) for n, image in enumerate(images)
    ]
    if not columns:
        return None
    preds = _Predictions(*map(np.concatenate, zip(*(of_image[0] for of_image in columns), strict=True)))
    truths = _Truths(*map(np.concatenate, zip(*(of_image[1] for of_image in columns), strict=True)))
    if not len(truths.label):
        return None
    num_gt_K = np.bincount(truths.label, minlength=len(labels))
    ap = _mean_ap(preds.label[preds.counts], preds.score[preds.counts], preds.right[preds.counts], num_gt_K)
    in_error = {kind: _images_in_error(kind, preds, truths) for kind in ErrorKind}
    label_P, score_P, right_P = _points(preds, None)
    return TideErrors(
        ap=ap,
        cost={kind: max(0.0, _mended_ap(kind, preds, truths, num_gt_K) - ap) for kind in ErrorKind},
        count={kind: len(rows) for kind, rows in in_error.items()},
        images={kind: np.unique(rows).tolist() for kind, rows in in_error.items()},
        cost_of_false_positives=_mean_ap(label_P, right_P.astype(np.float64), right_P, num_gt_K) - ap,
        cost_of_false_negatives=_mean_ap(
            label_P, score_P, right_P, np.bincount(truths.label[truths.found], minlength=len(labels))
        )
        - ap,
    )


def _image_columns(
    n: int, image: ImageResult, labels: dict[str, int], iou: float, background_iou: float, max_dets: int
) -> tuple[_Predictions, _Truths]:
    order = np.argsort(-image.pred.scores_N, kind="stable")[:max_dets]
    gts = np.flatnonzero(~image.gt.crowd_N)
    pred_label, gt_label = _labels(image.pred, labels)[order], _labels(image.gt, labels)[gts]
    iou_PG = pairwise_iou(image.pred.boxes_N4[order], image.gt.boxes_N4[gts])
    same_PG = pred_label[:, None] == gt_label[None, :]
    partner = _match(iou_PG * same_PG, iou)
    right, found = partner >= 0, np.isin(np.arange(len(gts)), partner)
    counts = right | (share_in_crowd(image)[order] <= iou)
    kind, about = _kinds(iou_PG, same_PG, found, iou, background_iou)
    kind[right] = -1
    fixed, usable = _mended(kind, about, found, pred_label, gt_label)
    preds = _Predictions(
        np.full(len(order), n), pred_label, image.pred.scores_N[order], right, counts, kind, fixed
    )
    return preds, _Truths(np.full(len(gts), n), gt_label, found, ~found & ~usable)


def _labels(objects: Objects, labels: dict[str, int]) -> IntArray:
    return np.array([labels.setdefault(desc, len(labels)) for desc in objects.descs], dtype=np.int64)


def _match(iou_PG: FloatArray, least: float) -> IntArray:
    """The object that each prediction gets, -1 for none: the first chooses first, and the object of largest IoU."""
    left_PG = iou_PG.copy()
    partner = np.full(len(iou_PG), -1)
    for p in np.flatnonzero((iou_PG >= least).any(axis=1)).tolist():
        g = int(left_PG[p].argmax())
        if left_PG[p, g] >= least:
            partner[p] = g
            left_PG[:, g] = 0.0
    return partner


def _kinds(
    iou_PG: FloatArray, same_PG: BoolArray, found_G: BoolArray, iou: float, background_iou: float
) -> tuple[IntArray, IntArray]:
    """Of every prediction, were it an error: the place of its kind, and the object it is about (-1: none).  [P]"""
    num_pred, num_gt = iou_PG.shape
    if not num_gt:
        return np.full(num_pred, _KINDS.index(ErrorKind.BACKGROUND)), np.full(num_pred, -1)
    of_class, of_other = iou_PG * same_PG, iou_PG * ~same_PG
    best = of_class.max(axis=1)
    tests = {
        ErrorKind.LOCALISATION: (background_iou <= best) & (best <= iou),
        ErrorKind.CLASS: of_other.max(axis=1) >= iou,
        ErrorKind.DUPLICATE: (of_class * found_G).max(axis=1) >= iou,
        ErrorKind.BACKGROUND: iou_PG.max(axis=1) <= background_iou,
    }
    places = [_KINDS.index(kind) for kind in tests]
    kind = np.select(list(tests.values()), places, default=_KINDS.index(ErrorKind.BOTH))
    about = np.select(
        [kind == _KINDS.index(ErrorKind.LOCALISATION), kind == _KINDS.index(ErrorKind.CLASS)],
        [of_class.argmax(axis=1), of_other.argmax(axis=1)],
        default=-1,
    )
    return kind, about


def _mended(
    kind: IntArray, about: IntArray, found_G: BoolArray, pred_label: IntArray, gt_label: IntArray
) -> tuple[IntArray, BoolArray]:
    """What mending makes of each prediction (-1: nothing), and which objects it could find.  [P], [G]

    Of several errors about one object the most confident is mended; an object that was found needs none.
    """
    fixed, usable = np.full(len(kind), -1), np.zeros(len(gt_label), dtype=bool)
    for p in np.flatnonzero((kind >= 0) & (about >= 0)).tolist():
        g = int(about[p])
        if found_G[g] or usable[g]:
            continue
        usable[g] = True
        fixed[p] = pred_label[p] if kind[p] == _KINDS.index(ErrorKind.LOCALISATION) else gt_label[g]
    return fixed, usable


def _points(preds: _Predictions, mended: ErrorKind | None) -> tuple[IntArray, FloatArray, BoolArray]:
    """Label, score and whether it is right of every prediction that AP counts, errors of one kind mended.

    Where scores are equal, those that were right come last, as in tidecv.
    """
    of_kind = preds.kind == (-2 if mended is None else _KINDS.index(mended))
    label, right = np.where(of_kind, preds.fixed, preds.label), preds.right | of_kind
    kept = np.flatnonzero(np.where(of_kind, preds.fixed >= 0, preds.counts))
    kept = np.concatenate([kept[~preds.right[kept]], kept[preds.right[kept]]])
    return label[kept], preds.score[kept], right[kept]


def _mended_ap(kind: ErrorKind, preds: _Predictions, truths: _Truths, num_gt_K: IntArray) -> float:
    if kind is ErrorKind.MISSED:
        num_gt_K = num_gt_K - np.bincount(truths.label[truths.missed], minlength=len(num_gt_K))
    return _mean_ap(*_points(preds, kind), num_gt_K)


def _images_in_error(kind: ErrorKind, preds: _Predictions, truths: _Truths) -> IntArray:
    """The image of every error of a kind."""
    in_error: IntArray = (
        truths.image[truths.missed]
        if kind is ErrorKind.MISSED
        else preds.image[preds.kind == _KINDS.index(kind)]
    )
    return in_error


def _mean_ap(label_D: IntArray, score_D: FloatArray, right_D: BoolArray, num_gt_K: IntArray) -> float:
    """Mean over the classes that are annotated or predicted of the precision at 101 recalls."""
    order = np.lexsort((-score_D, label_D))  # stable: equal scores keep their order
    num_pred_K = np.bincount(label_D, minlength=len(num_gt_K))
    starts_K = np.cumsum(num_pred_K) - num_pred_K
    values = []
    for k in np.flatnonzero((num_pred_K > 0) | (num_gt_K > 0)).tolist():
        right = right_D[order[starts_K[k] : starts_K[k] + num_pred_K[k]]]
        values.append(_average_precision(right, int(num_gt_K[k])))
    return float(np.mean(values)) if values else 0.0


def _average_precision(right_D: BoolArray, num_gt: int) -> float:
    if not num_gt or not len(right_D):
        return 0.0
    num_right_D = np.cumsum(right_D)
    precision_D = num_right_D / np.arange(1, len(right_D) + 1)
    envelope_D = np.maximum.accumulate(precision_D[::-1])[::-1]
    reached = np.searchsorted(num_right_D / num_gt, np.arange(101) / 100, side="left")
    return float(np.append(envelope_D, 0.0)[reached].mean())
