"""Boxes and polygons as numpy arrays: bins, pixels, overlap and area.

Two coordinate frames appear, and every function says which one it takes:

- *pixels*: floats in the frame of the image, x in [0, width - 1] and y in [0, height - 1] for pixel centres;
- *bins*: integers 0..999 per axis (`NUM_BINS` = 1000), what a coordinate token stands for. Bin k sits at
  k / 999 of the way from the first to the last pixel, on both axes, so a round trip moves a coordinate by at
  most half a bin.

Boxes are `xyxy` = (x1, y1, x2, y2) unless a name says `xywh` = (x1, y1, width, height) with width = x2 - x1.
Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coordexp.errors import RecordError

NUM_BINS = 1000
MAX_BIN = NUM_BINS - 1

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def quantize_points(points_xy: ArrayLike, width: int, height: int) -> IntArray:
    """Pixel points to bins: k = round(999 * x / max(1, width - 1)), y with height, clamped to 0..999.

    Halves round to the even bin, as Python's `round` does.

    points_xy: [..., 2] pixel (x, y);  width, height: image size in pixels.  Returns int64 [..., 2].
    Raises RecordError for a non-finite coordinate or an image side below 1.
    """
    points = np.asarray(points_xy, dtype=np.float64)
    if not np.isfinite(points).all():
        raise RecordError(f"cannot quantize coordinates {points.tolist()}: expected finite pixel values")
    bins = np.rint(MAX_BIN * points / _pixel_span(width, height))
    clamped: IntArray = np.clip(bins, 0, MAX_BIN).astype(np.int64)
    return clamped


def dequantize_points(bins_xy: ArrayLike, width: int, height: int) -> FloatArray:
    """Bins to pixel points: x = k / 999 * max(1, width - 1), y with height; undoes `quantize_points`.

    bins_xy: [..., 2] bins (x, y);  width, height: image size in pixels.  Returns float64 [..., 2] pixels.
    """
    bins = np.asarray(bins_xy, dtype=np.float64)
    points: FloatArray = bins * _pixel_span(width, height) / MAX_BIN
    return points


def quantize_boxes(boxes_xyxy: ArrayLike, width: int, height: int) -> IntArray:
    """Pixel boxes xyxy to bin boxes xyxy (rule of `quantize_points`).

    boxes_xyxy: [..., 4] pixels.  Returns int64 [..., 4] in 0..999.
    """
    boxes = np.asarray(boxes_xyxy, dtype=np.float64)
    return quantize_points(boxes.reshape(*boxes.shape[:-1], 2, 2), width, height).reshape(boxes.shape)


def dequantize_boxes(bins_xyxy: ArrayLike, width: int, height: int) -> FloatArray:
    """Bin boxes xyxy to pixel boxes xyxy (rule of `dequantize_points`).

    bins_xyxy: [..., 4] bins.  Returns float64 [..., 4] pixels.
    """
    bins = np.asarray(bins_xyxy, dtype=np.float64)
    return dequantize_points(bins.reshape(*bins.shape[:-1], 2, 2), width, height).reshape(bins.shape)


def xyxy_to_xywh(boxes_xyxy: ArrayLike) -> FloatArray:
    """Boxes (x1, y1, x2, y2) to (x1, y1, x2 - x1, y2 - y1), any one frame.  [..., 4] -> float64 [..., 4]."""
    boxes = np.asarray(boxes_xyxy, dtype=np.float64)
    return np.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], axis=-1)


def xywh_to_xyxy(boxes_xywh: ArrayLike) -> FloatArray:
    """Boxes (x1, y1, width, height) to (x1, y1, x1 + width, y1 + height).  [..., 4] -> float64 [..., 4]."""
    boxes = np.asarray(boxes_xywh, dtype=np.float64)
    return np.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], axis=-1)


def box_areas(boxes_xyxy: ArrayLike) -> FloatArray:
    """Area (x2 - x1) * (y2 - y1) of boxes xyxy; 0 where a side is negative.  [..., 4] -> float64 [...]."""
    boxes = np.asarray(boxes_xyxy, dtype=np.float64)
    sides = np.clip(boxes[..., 2:] - boxes[..., :2], 0.0, None)
    areas: FloatArray = sides[..., 0] * sides[..., 1]
    return areas


def pairwise_iou(boxes_xyxy_N4: ArrayLike, boxes_xyxy_M4: ArrayLike) -> FloatArray:
    """Intersection over union of every pair of boxes; 0 where both boxes have no area.

    boxes_xyxy_N4, boxes_xyxy_M4: [N, 4] and [M, 4] boxes xyxy in one frame; either may be empty (also `[]`).
    Returns float64 [N, M] in [0, 1].
    """
    boxes_N4 = np.asarray(boxes_xyxy_N4, dtype=np.float64).reshape(-1, 4)
    boxes_M4 = np.asarray(boxes_xyxy_M4, dtype=np.float64).reshape(-1, 4)
    top_left = np.maximum(boxes_N4[:, None, :2], boxes_M4[None, :, :2])
    bottom_right = np.minimum(boxes_N4[:, None, 2:], boxes_M4[None, :, 2:])
    intersection = np.clip(bottom_right - top_left, 0.0, None).prod(axis=-1)
    union = box_areas(boxes_N4)[:, None] + box_areas(boxes_M4)[None, :] - intersection
    iou: FloatArray = np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)
    return iou


def aligned_iou(boxes_xyxy_N4: FloatArray, others_xyxy_N4: FloatArray) -> FloatArray:
    """Intersection over union of each box with the other in its row, as `pairwise_iou` has it.  [N]"""
    top_left = np.maximum(boxes_xyxy_N4[:, :2], others_xyxy_N4[:, :2])
    sides = np.clip(np.minimum(boxes_xyxy_N4[:, 2:], others_xyxy_N4[:, 2:]) - top_left, 0.0, None)
    intersection = sides[:, 0] * sides[:, 1]
    union = box_areas(boxes_xyxy_N4) + box_areas(others_xyxy_N4) - intersection
    iou: FloatArray = np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)
    return iou


def polygon_points(values: Sequence[float] | ArrayLike) -> FloatArray:
    """Flat polygon (x0, y0, x1, y1, ...) to points float64 [V, 2], any frame.

    Raises RecordError unless there is an even number of at least 6 values.
    """
    flat = np.asarray(values, dtype=np.float64).reshape(-1)
    if flat.size < 6 or flat.size % 2:
        raise RecordError(
            f"a polygon needs an even number of at least 6 values (x, y, ...), found {flat.size}"
        )
    return flat.reshape(-1, 2)


def polygon_box(values: Sequence[float] | ArrayLike) -> FloatArray:
    """Smallest box xyxy around a flat polygon (x0, y0, x1, y1, ...), in the polygon's frame.  float64 [4]."""
    points = polygon_points(values)
    return np.concatenate([points.min(axis=0), points.max(axis=0)])


def polygon_area(values: Sequence[float] | ArrayLike) -> float:
    """Area of a simple flat polygon (x0, y0, x1, y1, ...), any frame, by the shoelace formula."""
    x, y = polygon_points(values).T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2.0)


def box_polygon(boxes_xyxy: ArrayLike) -> FloatArray:
    """Boxes xyxy as flat quadrilaterals (x1, y1, x2, y1, x2, y2, x1, y2).  [..., 4] -> float64 [..., 8]."""
    boxes = np.asarray(boxes_xyxy, dtype=np.float64)
    return boxes[..., [0, 1, 2, 1, 2, 3, 0, 3]]


def _pixel_span(width: int, height: int) -> FloatArray:
    """Distance in pixels between the first and the last pixel of each axis, at least 1.  float64 [2]."""
    if width < 1 or height < 1:
        raise RecordError(f"image size is {width} x {height}: width and height must be at least 1 pixel")
    return np.array([max(1, width - 1), max(1, height - 1)], dtype=np.float64)
