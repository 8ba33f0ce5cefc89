"""Mask IoU against a rasteriser written from scratch here, with the sampling rule of the COCO mask API.

The rule: coordinates are rounded to a grid five times finer; an edge is the chain of grid points nearest to
it, one per step of its longer axis; a pixel column is sampled where the chain crosses its middle; each
crossing toggles inside and outside from the first pixel at or below it to the end of the mask, column by
column.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.codec.schema import BoxObject
from coordexp.errors import ContractError
from coordexp.matching.cost import outlines_of, pairwise_mask_iou

FINER = 5


def fine(coordinate: float) -> int:
    return math.floor(FINER * coordinate + 0.5)


def box_pixels(bins: tuple[int, ...], resolution: int) -> np.ndarray:
    """Pixel c is in an interval if the step from fine point 5c + 2 to 5c + 3 is. bool [R, R], [y, x]."""
    scale = (resolution - 1) / 999
    x1, y1, x2, y2 = (fine(value * scale) for value in bins)
    middle = FINER * np.arange(resolution) + 2
    inside_x = (x1 <= middle) & (middle + 1 <= x2)
    inside_y = (y1 <= middle) & (middle + 1 <= y2)
    return inside_y[:, None] & inside_x[None, :]


def polygon_pixels(bins: tuple[int, ...], resolution: int) -> np.ndarray:
    """Even-odd fill of the fine boundary chain. bool [R, R], [y, x]."""
    scale = (resolution - 1) / 999
    corners = [(fine(x * scale), fine(y * scale)) for x, y in zip(bins[::2], bins[1::2], strict=True)]
    toggles = np.zeros(resolution * resolution + 1, dtype=np.int64)
    chain = [
        point for a, b in zip(corners, corners[1:] + corners[:1], strict=True) for point in edge_chain(a, b)
    ]
    for (x_before, y_before), (x_after, y_after) in itertools.pairwise(chain):
        column, rest = divmod(min(x_before, x_after) - 2, FINER)
        if x_before == x_after or rest or not 0 <= column <= resolution - 1:
            continue
        row = min(max(math.ceil((min(y_before, y_after) - 2) / FINER), 0), resolution)
        toggles[column * resolution + row] += 1
    return (np.cumsum(toggles)[:-1] % 2).astype(bool).reshape(resolution, resolution).T


def edge_chain(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """Fine points from start to end, one per step along the longer axis; the other axis rounds half up.

    An edge is always walked in the direction of its growing longer axis and then turned around, so that an
    edge shared by two polygons gives the same points in both.
    """
    along = 0 if abs(end[0] - start[0]) >= abs(end[1] - start[1]) else 1
    low, high = (start, end) if start[along] <= end[along] else (end, start)
    length = high[along] - low[along]
    points = []
    for step in range(length + 1):
        across = low[1 - along] + (high[1 - along] - low[1 - along]) / max(length, 1) * step
        point = (low[along] + step, int(across + 0.5))
        points.append(point if along == 0 else point[::-1])
    return points if low == start else points[::-1]


def pixels(shape: BoxObject, resolution: int) -> np.ndarray:
    rasterise = box_pixels if shape.kind == "bbox_2d" else polygon_pixels
    return rasterise(shape.bins, resolution)


def reference_iou(a: BoxObject, b: BoxObject, resolution: int) -> float:
    mask_a, mask_b = pixels(a, resolution), pixels(b, resolution)
    union = int((mask_a | mask_b).sum())
    return int((mask_a & mask_b).sum()) / union if union else 0.0


def mask_iou(preds: list[BoxObject], gts: list[BoxObject], resolution: int) -> np.ndarray:
    return pairwise_mask_iou(outlines_of(preds, "preds"), outlines_of(gts, "gts"), resolution)


def box(*bins: int) -> BoxObject:
    return BoxObject("thing", "bbox_2d", bins)


def poly(*bins: int) -> BoxObject:
    return BoxObject("thing", "poly", bins)


coordinate = st.integers(0, 999)
boxes = st.tuples(coordinate, coordinate, coordinate, coordinate).map(
    lambda c: box(min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3]))
)
polygons = st.lists(st.tuples(coordinate, coordinate), min_size=3, max_size=8).map(
    lambda points: poly(*(value for point in points for value in point))
)
shapes = st.one_of(boxes, polygons)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(boxes, min_size=1, max_size=6),
    st.lists(boxes, min_size=1, max_size=6),
    st.sampled_from([16, 64, 256]),
)
def test_boxes_equal_pixel_counts(preds, gts, resolution):
    expected = [[reference_iou(p, g, resolution) for g in gts] for p in preds]
    assert mask_iou(preds, gts, resolution).tolist() == expected


@settings(max_examples=150, deadline=None)
@given(
    st.lists(shapes, min_size=1, max_size=4),
    st.lists(shapes, min_size=1, max_size=4),
    st.sampled_from([32, 256]),
)
def test_polygons_and_boxes_equal_the_independent_rasterisation(preds, gts, resolution):
    expected = [[reference_iou(p, g, resolution) for g in gts] for p in preds]
    assert mask_iou(preds, gts, resolution).tolist() == expected


@settings(max_examples=150, deadline=None)
@given(st.lists(boxes, min_size=1, max_size=5), st.lists(boxes, min_size=1, max_size=5))
def test_a_box_and_its_quadrilateral_polygon_give_the_same_number(preds, gts):
    def as_polygon(shape: BoxObject) -> BoxObject:
        x1, y1, x2, y2 = shape.bins
        return poly(x1, y1, x2, y1, x2, y2, x1, y2)

    through_pixel_boxes = mask_iou(preds, gts, 256)
    through_run_lengths = mask_iou([as_polygon(p) for p in preds], [as_polygon(g) for g in gts], 256)
    assert through_pixel_boxes.tolist() == through_run_lengths.tolist()


def test_hand_worked_overlap_on_a_canvas_of_one_pixel_per_bin():
    # R = 1000: a box covers x2 - x1 columns. 40 x 40 = 1600 each, 20 x 40 = 800 shared.
    assert mask_iou([box(100, 100, 140, 140)], [box(120, 100, 160, 140)], 1000).item() == 800 / 2400


def test_half_square_triangle_has_half_the_pixels_of_its_box():
    triangle, square = poly(0, 0, 800, 800, 0, 800), box(0, 0, 800, 800)
    assert mask_iou([triangle], [square], 1000).item() == pytest.approx(0.5, abs=1e-3)


def test_coordinates_beyond_the_bins_are_clamped():
    assert mask_iou([box(-50, 0, 2000, 999)], [box(0, 0, 999, 999)], 256).item() == 1.0


def test_a_shape_without_pixels_overlaps_nothing_and_more_than_255_masks_are_fine():
    point = box(500, 500, 500, 500)
    assert mask_iou([point] * 300, [point, box(0, 0, 999, 999)], 256).tolist() == [[0.0, 0.0]] * 300


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (box(1, 2, 3), r"preds\[1\] is a 'bbox_2d' with 3 values"),
        (poly(1, 2, 3, 4), r"preds\[1\] is a 'poly' with 4 values"),
        (poly(1, 2, 3, 4, 5, 6, 7), r"preds\[1\] is a 'poly' with 7 values"),
        (BoxObject("thing", "line", (1, 2, 3, 4)), r"preds\[1\] is a 'line'"),
        (box(1, 2, float("nan"), 4), r"preds\[1\]\.bins holds a non-finite value"),
    ],
)
def test_a_malformed_shape_is_named(shape, message):
    with pytest.raises(ContractError, match=message):
        outlines_of([poly(0, 0, 9, 0, 9, 9), shape], "preds")
