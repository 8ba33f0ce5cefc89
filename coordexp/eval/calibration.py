"""Do scores mean what they say? Of the predictions with a score of 0.7, are seven in ten right?

    calibration = calibration_of(f1, scores_P, 0.5)
    calibration.ece, calibration.ece_isotonic

A prediction is right if one-to-one matching pairs it with an object of its description at the IoU; one inside a crowd
region counts neither way. The expected calibration error is the mean distance of score and share of right ones over
`NUM_SCORE_BINS` bins of equal width, weighted by their predictions (Naeini et al. 2015; Guo et al. 2017).

A score that ranks well need not be a probability. The isotonic fit is the best monotone map from scores to one, which
leaves the ranking as it is: what is left of the error with it is not a matter of scale. Each half of the images is
mapped by the fit on the other half, every second image in the order of ids being of one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from coordexp.eval.detection import DetectionSummary
from coordexp.geometry import FloatArray, IntArray

THRESHOLDS = (0.5, 0.75)
NUM_SCORE_BINS = 15

BoolArray = NDArray[np.bool_]


class ScoreBin(NamedTuple):
    """Predictions with a score above `low` (of the first bin also 0) up to `high`.

    score: their mean.  precision: share of right ones.
    """

    low: float
    high: float
    num: int
    score: float
    precision: float


@dataclass(frozen=True)
class Calibration:
    """Of the predictions that count at one IoU.

    bins: those that hold predictions.  isotonic_bins: of the mapped scores; ece_isotonic is their error. None and empty
    where one of the halves of the images has no prediction.
    """

    iou: float
    num: int
    mean_score: float
    precision: float
    ece: float
    ece_isotonic: float | None
    bins: tuple[ScoreBin, ...]
    isotonic_bins: tuple[ScoreBin, ...]

    def as_json(self) -> dict[str, Any]:
        """As metrics.json holds it."""
        tables = ("bins", "isotonic_bins")
        return asdict(self) | {name: [row._asdict() for row in getattr(self, name)] for name in tables}


def calibration_of(
    f1: DetectionSummary, scores_P: FloatArray, in_second_half_N: BoolArray, iou: float
) -> Calibration | None:
    """Of the predictions of all images, image after image.

    in_second_half_N: of the images.  None where nothing counts, or a score is outside [0, 1] and so no probability.
    """
    is_right_P, counts_P, image_P = f1.right_predictions(iou)
    scores, is_right = scores_P[counts_P], is_right_P[counts_P]
    if not len(scores) or scores.min() < 0.0 or scores.max() > 1.0:
        return None
    bins = reliability(scores, is_right)
    mapped = held_out_isotonic(scores, is_right, in_second_half_N[image_P[counts_P]])
    isotonic_bins = () if mapped is None else reliability(mapped, is_right)
    return Calibration(
        iou=iou,
        num=len(scores),
        mean_score=float(scores.mean()),
        precision=float(is_right.mean()),
        ece=calibration_error(bins),
        ece_isotonic=None if mapped is None else calibration_error(isotonic_bins),
        bins=bins,
        isotonic_bins=isotonic_bins,
    )


def reliability(
    scores_M: FloatArray, is_right_M: BoolArray, num_bins: int = NUM_SCORE_BINS
) -> tuple[ScoreBin, ...]:
    """Score and precision in each of `num_bins` bins of equal width that holds a prediction. Scores in [0, 1]."""
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    bin_M = score_bins(scores_M, num_bins)
    num, score, right = (
        np.bincount(bin_M, weights=weights, minlength=num_bins)
        for weights in (np.ones(len(bin_M)), scores_M, is_right_M.astype(np.float64))
    )
    return tuple(
        ScoreBin(
            float(edges[k]),
            float(edges[k + 1]),
            int(num[k]),
            float(score[k] / num[k]),
            float(right[k] / num[k]),
        )
        for k in np.flatnonzero(num).tolist()
    )


def score_bins(scores_M: FloatArray, num_bins: int = NUM_SCORE_BINS) -> IntArray:
    """The bin of each score in [0, 1].  int64 [M]"""
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    return np.searchsorted(edges[1:-1], scores_M, side="left")


def calibration_error(bins: tuple[ScoreBin, ...]) -> float:
    """Mean distance of score and precision, weighted by the predictions of each bin."""
    return sum(row.num * abs(row.precision - row.score) for row in bins) / sum(row.num for row in bins)


def held_out_isotonic(
    scores_M: FloatArray, is_right_M: BoolArray, in_second_half_M: BoolArray
) -> FloatArray | None:
    """Each score as the isotonic fit on the other half of the images maps it; None where a half has no prediction."""
    if in_second_half_M.all() or not in_second_half_M.any():
        return None
    mapped_M = np.empty_like(scores_M)
    for held_out_M in (in_second_half_M, ~in_second_half_M):
        known, fitted = isotonic_fit(scores_M[~held_out_M], is_right_M[~held_out_M])
        mapped_M[held_out_M] = np.interp(scores_M[held_out_M], known, fitted)
    return mapped_M


def isotonic_fit(scores_M: FloatArray, is_right_M: BoolArray) -> tuple[FloatArray, FloatArray]:
    """The distinct scores, ascending, and the non-decreasing shares of right ones of least squared error to them."""
    known, row_M, num = np.unique(scores_M, return_inverse=True, return_counts=True)
    share = np.bincount(row_M, weights=is_right_M.astype(np.float64)) / num
    return known, isotonic_regression(share, weights=num.astype(np.float64)).x
