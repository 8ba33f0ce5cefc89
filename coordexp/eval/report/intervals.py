"""Intervals of every headline number: all runs are resampled with the same images, so that differences are paired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from coordexp.eval.calibration import held_out_isotonic
from coordexp.eval.evaluate import Evaluation
from coordexp.eval.predictions.image_result import duplicate_rate
from coordexp.eval.report.bootstrap import (
    MIN_AP_RESAMPLES,
    Interval,
    affordable_resamples,
    coco_matches,
    image_weights,
    interval,
    lvis_matches,
    resample_indices,
    resampled_ap,
    resampled_calibration_error,
    resampled_class_averaged_f1,
    resampled_f1,
)
from coordexp.eval.report.numbers import RunNumbers
from coordexp.geometry import FloatArray, IntArray

MAX_CLASS_WORK = 100_000_000
"""Descriptions in images x resamples that class-averaged F1 may look at: some seconds on one core."""


class Intervals(NamedTuple):
    """95 % intervals by key: of each run, and of each run's difference from the first (None for the first)."""

    of_run: list[dict[str, Interval]]
    of_difference: list[dict[str, Interval] | None]
    num_ap_resamples: int


def bootstrap(runs: Sequence[RunNumbers], num_resamples: int, seed: int) -> Intervals:
    """Intervals from `num_resamples` resamples of the images, the same ones for every run."""
    if not num_resamples:
        return Intervals([{} for _ in runs], [None for _ in runs], 0)
    weights_BN = image_weights(resample_indices(len(runs[0].images), num_resamples, seed))
    num_ap = min(_ap_resamples(numbers.evaluation, num_resamples) for numbers in runs)
    num_by_class = min(_class_resamples(numbers.evaluation, num_resamples) for numbers in runs)
    values = [resampled_numbers(numbers.evaluation, weights_BN, num_ap, num_by_class) for numbers in runs]
    return Intervals(
        of_run=[{key: interval(found) for key, found in of_run.items()} for of_run in values],
        of_difference=[
            None
            if index == 0
            else {key: interval(found - values[0][key]) for key, found in of_run.items() if key in values[0]}
            for index, of_run in enumerate(values)
        ],
        num_ap_resamples=num_ap,
    )


def resampled_numbers(
    evaluation: Evaluation, weights_BN: IntArray, num_ap: int, num_by_class: int
) -> dict[str, FloatArray]:
    """Every headline number in every resample, under its key; fewer resamples for what costs more.

    The isotonic fits stay those of all images.
    """
    images = evaluation.images
    values = resampled_f1(weights_BN, evaluation.f1.counts_NT3)
    box_f1 = resampled_f1(weights_BN, evaluation.box_f1.counts_NT3)
    values["box_f1_50_95"] = box_f1["f1_50_95"]
    values["class_averaged_f1_50_95"] = resampled_class_averaged_f1(
        weights_BN[:num_by_class], *evaluation.f1.counts_by_class()
    )
    sums_N3 = np.array(
        [[duplicate_rate(image.pred), np.sum(~image.gt.crowd_N), len(image.pred)] for image in images]
    )
    duplicates, num_gt, num_pred = (weights_BN @ sums_N3).T
    values |= {"duplicate_rate_mean": duplicates / len(images), "num_gt": num_gt, "num_pred": num_pred}
    for iou, found in evaluation.calibration.items():
        if found is None:
            continue
        at = f"at_{round(100 * iou)}"
        is_right, counts, image = evaluation.f1.right_predictions(iou)
        is_right, image, scores = is_right[counts], image[counts], evaluation.scores_P[counts]
        values[f"ece_{at}"] = resampled_calibration_error(weights_BN, scores, is_right, image)
        mapped = held_out_isotonic(scores, is_right, evaluation.in_second_half_N[image])
        if mapped is not None:
            values[f"ece_isotonic_{at}"] = resampled_calibration_error(weights_BN, mapped, is_right, image)
    if num_ap:
        constant = replace(evaluation.results, score_M=np.ones_like(evaluation.results.score_M))
        matches_of = lvis_matches if evaluation.is_lvis else coco_matches
        values |= resampled_ap(weights_BN[:num_ap], matches_of(evaluation.results))
        values["AP_const"] = resampled_ap(weights_BN[:num_ap], matches_of(constant))["AP"]
    return values


def _ap_resamples(evaluation: Evaluation, num_resamples: int) -> int:
    if evaluation.metrics["AP"] < 0:  # no ground truth
        return 0
    return affordable_resamples(num_resamples, len(evaluation.results), len(evaluation.dataset.category_ids))


def _class_resamples(evaluation: Evaluation, num_resamples: int) -> int:
    num_rows = max(1, len(evaluation.f1.counts_by_class()[0]))
    return min(num_resamples, max(MIN_AP_RESAMPLES, MAX_CLASS_WORK // num_rows))
