"""Bins, pixels, boxes and polygons: hand-worked values and round trips."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordexp.errors import RecordError
from coordexp.geometry import (
    aligned_iou,
    box_areas,
    box_polygon,
    dequantize_boxes,
    dequantize_points,
    pairwise_iou,
    polygon_area,
    polygon_box,
    quantize_boxes,
    quantize_points,
    xywh_to_xyxy,
    xyxy_to_xywh,
)

sides = st.integers(1, 5000)
finite = st.floats(-1e4, 1e4)
bin_values = st.integers(0, 999)


def test_first_and_last_pixel_are_the_first_and_last_bin_on_both_axes():
    assert quantize_boxes([0, 0, 639, 479], 640, 480).tolist() == [0, 0, 999, 999]


def test_hand_worked_bins():
    # 999 * 100 / 639 = 156.34, 999 * 100 / 479 = 208.56, 999 * 320 / 639 = 500.28, 999 * 240 / 479 = 500.54
    assert quantize_boxes([[100, 100, 320, 240]], 640, 480).tolist() == [[156, 209, 500, 501]]


def test_halves_round_to_the_even_bin_as_python_does():
    # width 1999: 999 * x / 1998 = x / 2
    assert quantize_points([[1, 3], [5, 7]], 1999, 1999).tolist() == [
        [round(0.5), round(1.5)],
        [round(2.5), round(3.5)],
    ]


@given(st.tuples(finite, finite), sides, sides)
def test_quantize_is_the_scalar_rule_with_a_clamp(point, width, height):
    def rule(value, side):
        return min(999, max(0, round(999 * value / max(1, side - 1))))

    expected = [rule(point[0], width), rule(point[1], height)]
    assert quantize_points(point, width, height).tolist() == expected


@given(st.lists(bin_values, min_size=4, max_size=4), sides, sides)
def test_bins_survive_the_way_to_pixels_and_back(bins, width, height):
    assert quantize_boxes(dequantize_boxes(bins, width, height), width, height).tolist() == bins


@given(st.tuples(st.floats(0, 1), st.floats(0, 1)), st.integers(2, 5000), st.integers(2, 5000))
def test_pixels_move_by_at_most_half_a_bin(unit, width, height):
    span = np.array([width - 1, height - 1])
    pixels = np.array(unit) * span
    moved = dequantize_points(quantize_points(pixels, width, height), width, height) - pixels
    assert (np.abs(moved) <= span / 999 / 2 + 1e-9).all()


def test_an_image_of_one_pixel_has_a_span_of_one():
    assert quantize_boxes([0, 0, 1, 0], 1, 1).tolist() == [0, 0, 999, 0]
    assert dequantize_boxes([0, 0, 999, 0], 1, 1).tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_pixels_and_empty_images_are_refused(bad):
    with pytest.raises(RecordError, match="finite"):
        quantize_boxes([0, bad, 1, 1], 10, 10)
    with pytest.raises(RecordError, match="image size is 0 x 10"):
        dequantize_boxes([0, 0, 1, 1], 0, 10)


def test_xyxy_and_xywh_are_each_others_inverse():
    boxes_xyxy = [[10, 20, 30, 60], [0, 0, 0, 5]]
    assert xyxy_to_xywh(boxes_xyxy).tolist() == [[10, 20, 20, 40], [0, 0, 0, 5]]
    assert xywh_to_xyxy(xyxy_to_xywh(boxes_xyxy)).tolist() == boxes_xyxy


def test_pairwise_iou_by_hand():
    boxes = [[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30], [10, 0, 20, 10]]
    iou = pairwise_iou(boxes[:2], boxes)
    assert iou.dtype == np.float64
    assert iou.tolist() == [[1.0, 50 / 150, 0.0, 0.0], [50 / 150, 1.0, 0.0, 50 / 150]]


def test_boxes_without_area_overlap_nothing_not_even_themselves():
    assert pairwise_iou([[5, 5, 5, 5], [9, 0, 3, 4]], [[5, 5, 5, 5], [0, 0, 10, 10]]).tolist() == [
        [0, 0],
        [0, 0],
    ]


def test_pairwise_iou_takes_empty_sides_and_unsigned_integers():
    assert pairwise_iou([], [[0, 0, 1, 1]]).shape == (0, 1)
    assert pairwise_iou(np.zeros((2, 4)), []).shape == (2, 0)
    boxes = np.array([[0, 0, 10, 10], [20, 20, 30, 30]], dtype=np.uint16)
    assert pairwise_iou(boxes, boxes).tolist() == [[1.0, 0.0], [0.0, 1.0]]


@given(st.lists(st.tuples(bin_values, bin_values, bin_values, bin_values), min_size=1, max_size=5))
def test_pairwise_iou_is_symmetric_and_at_most_one(corners):
    boxes = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in corners]
    iou = pairwise_iou(boxes, boxes)
    assert (iou == iou.T).all()
    assert ((iou >= 0) & (iou <= 1)).all()
    assert (np.diag(iou) == (box_areas(boxes) > 0)).all()
    rows, columns = np.indices(iou.shape).reshape(2, -1)
    assert (aligned_iou(np.array(boxes)[rows], np.array(boxes)[columns]) == iou.ravel()).all()


def test_areas_of_boxes_and_polygons():
    assert box_areas([[0, 0, 4, 5], [4, 0, 0, 5]]).tolist() == [20, 0]
    assert polygon_area((0, 0, 4, 0, 0, 3)) == 6.0
    assert polygon_area((0, 3, 4, 0, 0, 0)) == 6.0
    assert polygon_area(box_polygon([2, 3, 12, 8])) == 50.0


def test_polygon_box_is_its_extent():
    assert polygon_box((5, 9, 2, 4, 8, 7)).tolist() == [2, 4, 8, 9]
    assert polygon_box(box_polygon([2, 3, 12, 8])).tolist() == [2, 3, 12, 8]


@pytest.mark.parametrize("values", [(0, 0, 1, 1), (0, 0, 1, 1, 2, 2, 3)])
def test_a_polygon_of_the_wrong_length_is_refused(values):
    with pytest.raises(RecordError, match="even number of at least 6"):
        polygon_box(values)
