"""Costs of error kinds: worked by hand, and equal to the tidecv package on random detections."""

from __future__ import annotations

import numpy as np
import pytest
from support.images import image_result

from coordexp.eval.errors.tide import ErrorKind, tide_errors
from coordexp.eval.predictions.image_result import ImageResult
from coordexp.geometry import xyxy_to_xywh

NAMES = ("cat", "dog", "bird", "cow")
PACKAGE_KINDS = dict(zip(ErrorKind, ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"), strict=True))


def random_images(seed: int, *, crowds: bool, ties: bool, names: int = 4) -> list[ImageResult]:
    """Objects, predictions near them (some repeated, some of another name), and predictions of nothing."""
    rng = np.random.default_rng(seed)
    images = []
    for image_id in range(int(rng.integers(1, 14))):
        gt, pred = [], []
        for _ in range(int(rng.integers(0, 7))):
            corner, side = rng.uniform(0, 150, 2), rng.uniform(5, 90, 2)
            box = np.concatenate([corner, corner + side])
            gt.append((NAMES[rng.integers(names - 1)], box.tolist()))
            for _ in range(int(rng.integers(0, 4))):
                shift = rng.normal(0, rng.choice([0.03, 0.2, 0.6]) * side.mean(), 4)
                moved = box + shift
                moved[2:] = np.maximum(moved[2:], moved[:2] + 1.0)
                desc = gt[-1][0] if rng.random() < 0.7 else NAMES[rng.integers(names)]
                pred.append((desc, moved.tolist()))
        for _ in range(int(rng.integers(0, 4))):
            corner = rng.uniform(0, 200, 2)
            pred.append((NAMES[rng.integers(names)], [*corner, *(corner + rng.uniform(3, 80, 2))]))
        scores = rng.integers(1, 6, len(pred)) / 5 if ties else rng.random(len(pred))
        flags = [crowds and bool(rng.random() < 0.15) for _ in gt]
        scored = [(*one, float(score)) for one, score in zip(pred, scores, strict=True)]
        images.append(image_result(image_id, 300, 300, gt, scored, crowd=flags))
    return images


def package_result(images: list[ImageResult], max_dets: int) -> dict[str, float]:
    """What tidecv says, in percentage points, and its counts."""
    tidecv = pytest.importorskip("tidecv")
    truth, found = tidecv.Data("gt", max_dets=max_dets), tidecv.Data("pred", max_dets=max_dets)
    for image in images:
        truth.add_image(image.image_id, "")
        found.add_image(image.image_id, "")
        for desc, box, crowd in zip(
            image.gt.descs, xyxy_to_xywh(image.gt.boxes_N4).tolist(), image.gt.crowd_N, strict=True
        ):
            add = truth.add_ignore_region if crowd else truth.add_ground_truth
            add(image.image_id, NAMES.index(desc), box)
        for desc, box, score in zip(
            image.pred.descs, xyxy_to_xywh(image.pred.boxes_N4).tolist(), image.pred.scores_N, strict=True
        ):
            found.add_detection(image.image_id, NAMES.index(desc), float(score), box)
    tide = tidecv.TIDE()
    run = tide.evaluate(truth, found, mode=tidecv.TIDE.BOX)
    main, special = tide.get_main_errors()["pred"], tide.get_special_errors()["pred"]
    counts = {error.short_name: number for error, number in run.count_errors().items()}
    return {"ap": run.ap, **main, **special, **{f"num_{name}": number for name, number in counts.items()}}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("crowds", [False, True])
@pytest.mark.parametrize("max_dets", [100, 4])
def test_costs_are_those_of_the_tidecv_package(ties, crowds, max_dets):
    seen = dict.fromkeys(ErrorKind, 0)
    for seed in range(8):
        images = random_images(seed, crowds=crowds, ties=ties)
        tide = tide_errors(images, max_dets=max_dets)
        if tide is None:
            continue
        expected = package_result(images, max_dets)
        ours = {
            "ap": 100 * tide.ap,
            **{PACKAGE_KINDS[kind]: 100 * cost for kind, cost in tide.cost.items()},
            "FalsePos": 100 * tide.cost_of_false_positives,
            "FalseNeg": 100 * tide.cost_of_false_negatives,
            **{f"num_{PACKAGE_KINDS[kind]}": number for kind, number in tide.count.items()},
        }
        assert ours == pytest.approx(expected, abs=1e-9), seed
        for kind, number in tide.count.items():
            seen[kind] += number
    assert min(seen.values()) > 5  # every kind was there


SQUARE = [0.0, 0.0, 10.0, 10.0]
FAR = [50.0, 50.0, 60.0, 60.0]


@pytest.mark.parametrize(
    ("pred", "kind", "cost"),
    [
        ([("dog", SQUARE, 0.9)], ErrorKind.CLASS, 1.0),  # mended, dog is no class any more
        ([("cat", [0.0, 0.0, 10.0, 30.0], 0.9)], ErrorKind.LOCALISATION, 1.0),  # IoU 1/3
        ([("dog", [0.0, 0.0, 10.0, 30.0], 0.9), ("cat", SQUARE, 0.8)], ErrorKind.BOTH, 0.5),
        ([("cat", SQUARE, 0.9), ("cat", SQUARE, 0.8)], ErrorKind.DUPLICATE, 0.0),  # below every right one
        (
            [("cat", FAR, 0.9), ("cat", SQUARE, 0.8)],
            ErrorKind.BACKGROUND,
            0.5,
        ),  # precision 1/2 at every recall
        ([], ErrorKind.MISSED, 0.0),  # nothing would be left to measure
    ],
)
def test_a_single_error_is_of_its_kind_and_costs_what_it_takes_away(pred, kind, cost):
    tide = tide_errors([image_result(0, 100, 100, [("cat", SQUARE)], pred)])
    expected = dict.fromkeys(ErrorKind, 0) | {kind: 1}
    if kind in (ErrorKind.CLASS, ErrorKind.LOCALISATION):
        assert tide.ap == 0.0
    assert tide.count == expected
    assert tide.images == {other: [0] if other is kind else [] for other in ErrorKind}
    assert tide.cost[kind] == pytest.approx(cost)


def test_half_of_the_objects_missed():
    images = [image_result(0, 100, 100, [("cat", SQUARE), ("cat", FAR)], [("cat", SQUARE, 0.5)])]
    tide = tide_errors(images)
    assert tide.ap == pytest.approx(51 / 101)  # recalls 0 to 0.5
    assert tide.cost[ErrorKind.MISSED] == tide.cost_of_false_negatives == pytest.approx(50 / 101)
    assert tide.cost_of_false_positives == 0.0


def test_without_an_annotated_object_there_is_nothing_to_measure():
    assert tide_errors([image_result(0, 100, 100, [], [("cat", SQUARE, 0.5)])]) is None
    assert tide_errors([]) is None
