"""Boxes that are not what they are read as: every kind is found, and ordinary data sets are left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.data.check.boxes import box_findings, duplicate_pairs
from coordexp.data.check.findings import MAX_EXAMPLES, Finding, Level, found, raise_errors
from coordexp.errors import RecordError
from coordexp.eval.coco.annotations import Dataset, read_dataset
from coordexp.geometry import pairwise_iou, xywh_to_xyxy

REAL = Path(__file__).parents[3] / "fixtures" / "coco_val2014_100" / "instances_val2014_100.json"
WIDTH, HEIGHT = 640, 480


def dataset(
    boxes: list[list[float]],
    *,
    size: tuple[int, int] | None = (WIDTH, HEIGHT),
    per_image: int = 5,
    **columns: Any,
) -> Dataset:
    """Boxes xywh, `per_image` of them in each image, of two classes in turn; more keys as lists, one per box."""
    num_images = -(-len(boxes) // per_image)
    shape = {} if size is None else {"width": size[0], "height": size[1]}
    annotations = [
        {"id": i, "image_id": i // per_image, "category_id": i % 2, "bbox": box}
        | {key: values[i] for key, values in columns.items()}
        for i, box in enumerate(boxes)
    ]
    return read_dataset(
        {
            "images": [{"id": n, **shape} for n in range(num_images)],
            "annotations": annotations,
            "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}],
        }
    )


def kinds(data: Dataset) -> dict[str, tuple[str, int]]:
    return {finding.kind: (str(finding.level), finding.count) for finding in box_findings(data)}


def random_boxes(count: int, seed: int, max_side: float = 200) -> np.ndarray:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, (WIDTH - max_side, HEIGHT - max_side), (count, 2))
    return np.concatenate([corner, rng.uniform(5, max_side, (count, 2))], axis=1).round(1)


def as_corners(boxes: np.ndarray) -> list[list[float]]:
    return xywh_to_xyxy(boxes).tolist()


def test_ordinary_boxes_have_no_finding():
    assert kinds(dataset(random_boxes(300, seed=1).tolist())) == {}
    assert kinds(dataset(random_boxes(300, seed=1).tolist(), size=None)) == {}
    assert kinds(dataset([])) == {}
    assert kinds(dataset([[0, 0, WIDTH, HEIGHT]] * 20, per_image=1)) == {}  # the whole picture
    assert kinds(dataset([[0, 0, 1, 1], [3, 4, 1, 2]])) == {}  # small, in whole pixels
    real = read_dataset(json.loads(REAL.read_text()))
    assert kinds(real) == {"boxes_of_two_names": ("warning", 2)}
    large = [[40.5, 50, 590, 420], [30, 20, 600, 455.5], [0, 0, 640, 480]]  # width > x and height > y
    assert kinds(dataset(large * 7, per_image=1)) == {}


@pytest.mark.parametrize("num_boxes", [1, 2, 3, 200])
def test_corners_are_found_by_their_areas(num_boxes: int):
    boxes = random_boxes(num_boxes, seed=2)
    data = dataset(as_corners(boxes), area=(boxes[:, 2] * boxes[:, 3]).tolist(), size=None)
    assert kinds(data)["boxes_are_corners"] == ("error", num_boxes)


@pytest.mark.parametrize("num_boxes", [1, 200])
def test_corners_are_found_by_their_outlines(num_boxes: int):
    boxes = random_boxes(num_boxes, seed=3)
    outlines = [[[x, y, x + w, y, x + w, y + h, x, y + h]] for x, y, w, h in boxes.tolist()]
    data = dataset(as_corners(boxes), segmentation=outlines, area=[50.0] * num_boxes, size=None)
    assert kinds(data)["boxes_are_corners"] == ("error", num_boxes)


def test_corners_are_found_by_the_picture_they_leave():
    findings = box_findings(dataset(as_corners(random_boxes(200, seed=4))))
    assert [finding.kind for finding in findings] == ["boxes_are_corners"]
    assert "reach beyond their picture" in findings[0].message
    assert "width = x2 - x1" in findings[0].message
    assert kinds(dataset([[400, 300, 600, 460]]))["boxes_are_corners"] == ("error", 1)


@pytest.mark.parametrize("size", [(WIDTH, HEIGHT), None])
@pytest.mark.parametrize("num_boxes", [1, 2, 150])
def test_shares_of_the_picture_are_found(num_boxes: int, size: Any):
    boxes = random_boxes(num_boxes, seed=5) / [WIDTH, HEIGHT, WIDTH, HEIGHT]
    data = dataset(boxes.tolist(), size=size)
    assert kinds(data)["normalised_boxes"] == ("error", num_boxes)
    with pytest.raises(
        RecordError, match=r"x\.json: .* lies? within 0\.\.1 and looks? normalised .*`coordexp data check`"
    ):
        raise_errors(box_findings(data), "x.json: ")


def test_a_few_shares_among_pixels_are_a_warning():
    boxes = [*random_boxes(40, seed=6).tolist(), [0.1, 0.2, 0.3, 0.4], [0.2, 0.2, 0.5, 0.1]]
    assert kinds(dataset(boxes))["normalised_boxes"] == ("warning", 2)


def test_boxes_of_another_picture_size_are_suspicious():
    boxes = random_boxes(200, seed=7)
    smaller = kinds(dataset((boxes / 4).tolist()))
    assert smaller["boxes_in_one_corner"] == ("warning", 200)
    larger = {finding.kind: finding for finding in box_findings(dataset((boxes * 2).tolist()))}
    assert larger["boxes_outside"].level is larger["boxes_beyond"].level is Level.WARNING
    assert "drawn on a larger picture?" in larger["boxes_outside"].message
    outside = ((boxes[:, :2] * 2 >= (WIDTH, HEIGHT)).any(axis=1)).sum()
    assert larger["boxes_outside"].count == outside


def test_boxes_that_are_left_out_or_cut_are_counted():
    boxes = [
        [10, 10, 20, 0],
        [700, 5, 9, 9],
        [600, 400, 90, 50],
        [-20, 5, 60, 60],
        [638, 477, 3, 4],
        [5, 5, 9, 9],
    ]
    assert kinds(dataset(boxes)) == {
        "boxes_outside": ("warning", 1),
        "boxes_beyond": ("warning", 2),  # a pixel or two beyond the border are not worth a word
        "boxes_without_extent": ("warning", 1),
    }


def test_near_duplicates_of_one_and_of_two_names():
    boxes = [
        [10, 10, 100, 100],
        [200, 200, 50, 50],
        [12, 11, 100, 100],
        [10, 10, 101, 99],
        [200, 200, 50, 40],
    ]
    data = dataset(boxes)
    assert duplicate_pairs(data).tolist() == [[0, 2], [0, 3], [2, 3]]
    assert kinds(data) == {"duplicate_boxes": ("warning", 1), "boxes_of_two_names": ("warning", 2)}
    [first, second] = box_findings(data)
    assert first.examples == ("annotations[0] (id 0) and annotations[2] (id 2)",)
    assert second.images == (0,)
    crowd = dataset(boxes, iscrowd=[1, 0, 0, 0, 0])
    assert duplicate_pairs(crowd).tolist() == [[2, 3]]
    assert duplicate_pairs(dataset(boxes, per_image=1)).tolist() == []


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_duplicate_pairs_are_those_of_all_pairs(count: int, per_image: int, seed: int):
    rng = np.random.default_rng(seed)
    base = random_boxes(3, seed=seed)
    boxes = base[rng.integers(0, 3, count)] + rng.normal(0, 3, (count, 4))
    data = dataset(np.abs(boxes).tolist(), per_image=per_image)
    iou = pairwise_iou(xywh_to_xyxy(data.boxes_xywh_M4), xywh_to_xyxy(data.boxes_xywh_M4))
    expected = [
        [a, b]
        for a in range(count)
        for b in range(a + 1, count)
        if a // per_image == b // per_image and iou[a, b] > 0.9
    ]
    assert duplicate_pairs(data).tolist() == expected


def test_a_finding_names_a_few_places_and_how_many_more():
    finding = found(
        Level.ERROR, "kind", "{count} things", list(range(12)), lambda row: f"thing {row}", [3, 3, 4]
    )
    assert finding is not None
    assert str(finding) == "12 things (thing 0, thing 1, thing 2, thing 3, thing 4 and 7 more)"
    assert (finding.count, len(finding.examples), finding.images) == (12, MAX_EXAMPLES, (3, 4))
    assert found(Level.ERROR, "kind", "{count} things", [], str) is None
    raise_errors([Finding(Level.WARNING, "kind", "odd")])
    with pytest.raises(RecordError, match=r"^f: bad \(and 1 other kind of error\)\. `coordexp data check`"):
        raise_errors([Finding(Level.ERROR, "a", "bad"), Finding(Level.ERROR, "b", "worse")], "f: ")
