"""Bootstrap intervals of a report: every number of a resample is that of evaluating the drawn images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.lvis_reference import random_lvis

from coordexp.eval.box_matching import BoxSet
from coordexp.eval.coco.annotations import read_dataset, read_results
from coordexp.eval.coco.evaluate import run_coco, run_lvis
from coordexp.eval.detection import match_boxes
from coordexp.eval.evaluate import ScoredSet, evaluate
from coordexp.eval.report.bootstrap import (
    affordable_resamples,
    coco_matches,
    image_weights,
    lvis_matches,
    resample_indices,
    resampled_ap,
    resampled_f1,
)
from coordexp.eval.report.data import load_run
from coordexp.eval.report.headline import MEASURES
from coordexp.eval.report.intervals import bootstrap, resampled_numbers
from coordexp.eval.report.numbers import compute_numbers

COCO_FIXTURE = Path(__file__).resolve().parents[2] / "fixtures" / "coco_val2014_100"


def test_f1_intervals_equal_a_loop_over_resamples(runs):
    numbers = compute_numbers(load_run(runs[0]))
    indices = resample_indices(12, 30, seed=5)
    fast = resampled_f1(image_weights(indices), numbers.evaluation.f1.counts_NT3)
    for b, drawn in enumerate(indices):
        summary = match_boxes(BoxSet.of([numbers.images[i] for i in drawn]))
        expected = {
            "f1_at_50": summary.f1_at(0.5),
            "f1_50_95": summary.f1_50_95,
            "precision_at_50": summary.at(0.5).micro.precision,
            "recall_at_50": summary.at(0.5).micro.recall,
            "f1_at_95": summary.f1_at(0.95),
        }
        assert {key: values[b] for key, values in fast.items()} == pytest.approx(expected, abs=1e-12)


def coco_copies(gt: dict, preds: list[dict], drawn: np.ndarray) -> tuple[dict, list[dict]]:
    """The data set in which the drawn images stand as images of their own.

    Scores become ranks that put the copies of a detection beside each other, also where detections tie.
    """
    ids = sorted(image["id"] for image in gt["images"])
    position = {image_id: index for index, image_id in enumerate(ids)}
    ranked = sorted(preds, key=lambda pred: (-pred["score"], position[pred["image_id"]]))
    images, annotations, results = [], [], []
    for new_id, index in enumerate(sorted(drawn)):
        images.append({**next(i for i in gt["images"] if i["id"] == ids[index]), "id": new_id})
        annotations += [{**a, "image_id": new_id} for a in gt["annotations"] if a["image_id"] == ids[index]]
        results += [
            {**pred, "image_id": new_id, "score": -float(rank * len(ids) + new_id)}
            for rank, pred in enumerate(ranked)
            if pred["image_id"] == ids[index]
        ]
    for number, annotation in enumerate(annotations):
        annotation["id"] = number
    return {**gt, "images": images, "annotations": annotations}, results


@pytest.mark.parametrize("constant", [False, True])
def test_ap_of_a_resample_is_pycocotools_on_the_drawn_images(constant):
    """On real annotations (crowds, classes that drop out of a resample), with and without ties."""
    gt = json.loads((COCO_FIXTURE / "instances_val2014_100.json").read_text())
    preds = json.loads((COCO_FIXTURE / "instances_val2014_fakebbox100_results.json").read_text())
    if constant:
        preds = [{**pred, "score": 1.0} for pred in preds]
    indices = np.vstack([np.arange(100), resample_indices(100, 3, seed=1)])
    fast = resampled_ap(image_weights(indices), coco_matches(read_results(preds, read_dataset(gt))))
    for b, drawn in enumerate(indices):
        expected = run_coco(*coco_copies(gt, preds, drawn)).metrics
        for key, values in fast.items():
            assert values[b] == pytest.approx(expected["AR100" if key == "AR" else key], abs=1e-12), (key, b)


@pytest.mark.parametrize("seed", [2, 5])
def test_ap_of_a_resample_is_that_of_lvis_on_the_drawn_images(seed):
    """Also where an image holds more detections than count (seed 2)."""
    gt, preds = random_lvis(seed, crowded=seed == 2)
    preds = [{**pred, "score": pred["score"] - 1e-6 * row} for row, pred in enumerate(preds)]  # no ties
    indices = np.vstack([np.arange(30), resample_indices(30, 3, seed=1)])
    fast = resampled_ap(image_weights(indices), lvis_matches(read_results(preds, read_dataset(gt))))
    for b, drawn in enumerate(indices):
        copied, results = coco_copies(gt, preds, drawn)
        dataset = read_dataset(copied)
        expected = run_lvis(dataset, read_results(results, dataset)).metrics
        for key, values in fast.items():
            assert values[b] == pytest.approx(expected["AR300" if key == "AR" else key], abs=1e-12), (key, b)


def test_every_headline_number_of_a_resample_is_that_of_evaluating_the_drawn_images(runs):
    numbers = compute_numbers(load_run(runs[0]))
    drawn = resample_indices(12, 1, seed=3)[0]
    found = resampled_numbers(numbers.evaluation, image_weights(drawn[None]), 1, 1)
    copies = [replace(numbers.images[i], image_id=n) for n, i in enumerate(sorted(drawn))]
    again = evaluate(ScoredSet("copies", copies))
    resampled = {measure.key for measure in MEASURES} - {"ece_isotonic_at_50", "ece_isotonic_at_75"}
    assert resampled < found.keys()  # the isotonic ones keep the fits of all images
    ties = {"AP", "AP50", "AP75", "AR", "AP_const"}  # see the test above
    for key in resampled - ties:
        assert found[key][0] == pytest.approx(again.metrics[key], abs=1e-12), key
    everything = resampled_numbers(numbers.evaluation, np.ones((1, 12), dtype=np.int64), 1, 1)
    for key, values in everything.items():
        assert values[0] == pytest.approx(numbers.evaluation.metrics[key], abs=1e-12), key


def test_intervals_of_differences_are_paired(runs):
    numbers = [compute_numbers(load_run(run)) for run in (runs[0], runs[0], runs[1])]
    intervals = bootstrap(numbers, 200, seed=0)
    assert intervals.of_difference[0] is None
    assert set(intervals.of_difference[1].values()) == {(0.0, 0.0)}  # a run and itself
    low, high = intervals.of_difference[2]["f1_50_95"]
    assert 0 < low < numbers[2].evaluation.f1.f1_50_95 - numbers[0].evaluation.f1.f1_50_95 < high
    assert bootstrap(numbers, 200, seed=0) == intervals


def test_ap_intervals_use_as_many_resamples_as_they_can_afford():
    assert affordable_resamples(1000, num_detections=300, num_categories=12) == 1000
    assert 200 <= affordable_resamples(1000, num_detections=36_000, num_categories=80) < 1000
    assert affordable_resamples(1000, num_detections=500_000, num_categories=80) == 200  # takes its time
    assert affordable_resamples(1000, num_detections=6_000_000, num_categories=1203) == 0
    assert affordable_resamples(20, num_detections=100, num_categories=3) == 20
