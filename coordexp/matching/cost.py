"""What a pair of objects costs: candidates by box overlap, then IoU of the two rasterised shapes.

Shapes live in bin space (0..999 on both axes). For mask IoU they are clamped to it, scaled by (R - 1) / 999
onto an R x R canvas and rasterised by pycocotools, a box as its quadrilateral.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from coordexp.codec.schema import KIND_BBOX, KIND_POLY
from coordexp.errors import ContractError
from coordexp.geometry import MAX_BIN, FloatArray, IntArray, box_polygon, pairwise_iou

BoolArray = NDArray[np.bool_]
RunLengthMask = dict[str, Any]


class Shape(Protocol):
    """What matching needs of an object: `coordexp.codec.schema.BoxObject`, or anything alike.

    kind: "bbox_2d" with bins (x1, y1, x2, y2), or "poly" with bins (x0, y0, x1, y1, ...), at least 3 points.
    """

    @property
    def kind(self) -> str: ...

    @property
    def bins(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class Outlines:
    """N shapes as closed outlines in bin space, clamped to 0..999.

    corners: per shape its flat corners (x0, y0, x1, y1, ...), a box as the 8 values of its quadrilateral.
    boxes_xyxy: float64 [N, 4], the box around each shape.  is_box: bool [N], True for a "bbox_2d".
    """

    corners: list[FloatArray]
    boxes_xyxy: FloatArray
    is_box: BoolArray

    def __len__(self) -> int:
        return len(self.corners)


def outlines_of(shapes: Sequence[Shape], side: str) -> Outlines:
    """Outlines of shapes of either kind; bins of any numeric type give the same outlines.

    side: "preds" or "gts", for the message of the ContractError that a malformed shape raises.
    """
    if not shapes:
        return Outlines([], np.zeros((0, 4)), np.zeros(0, dtype=np.bool_))
    for index, shape in enumerate(shapes):
        _check_shape(shape, f"{side}[{index}]")
    sizes_N = np.array([len(shape.bins) for shape in shapes])
    ends_N = np.cumsum(sizes_N)
    starts_N = ends_N - sizes_N
    values = np.fromiter(chain.from_iterable(shape.bins for shape in shapes), dtype=np.float64)
    if not np.isfinite(values).all():
        index = int(np.searchsorted(ends_N, np.flatnonzero(~np.isfinite(values))[0], side="right"))
        raise ContractError(
            f"{side}[{index}].bins holds a non-finite value: {shapes[index].bins}; expected 0..999"
        )
    values = np.clip(values, 0.0, MAX_BIN)
    points = values.reshape(-1, 2)
    lows = np.minimum.reduceat(points, starts_N // 2)
    highs = np.maximum.reduceat(points, starts_N // 2)
    boxes_xyxy = np.concatenate([lows, highs], axis=1)
    is_box = np.array([shape.kind == KIND_BBOX for shape in shapes])
    quadrilaterals = box_polygon(boxes_xyxy)
    corners = [
        quadrilaterals[i] if is_box[i] else values[start:end]
        for i, (start, end) in enumerate(zip(starts_N, ends_N, strict=True))
    ]
    return Outlines(corners, boxes_xyxy, is_box)


def candidate_pairs(boxes_xyxy_P4: FloatArray, boxes_xyxy_G4: FloatArray, top_k: int) -> BoolArray:
    """The pairs worth rasterising: for each prediction its `top_k` ground truths of highest box IoU.

    A prediction that overlaps no ground truth takes the `top_k` nearest by distance of box centres instead.
    Ties go to the lower ground-truth index.

    boxes_xyxy_P4, boxes_xyxy_G4: float64 boxes xyxy in bins.  Returns bool [P, G], True for a candidate pair.
    """
    num_preds, num_gts = len(boxes_xyxy_P4), len(boxes_xyxy_G4)
    if num_gts <= top_k:
        return np.ones((num_preds, num_gts), dtype=np.bool_)
    iou_PG = pairwise_iou(boxes_xyxy_P4, boxes_xyxy_G4)
    rank_key_PG = -iou_PG
    isolated_P = iou_PG.max(axis=1) == 0.0
    rank_key_PG[isolated_P] = _centre_distance(boxes_xyxy_P4[isolated_P], boxes_xyxy_G4)
    nearest_Pk = np.argsort(rank_key_PG, axis=1, kind="stable")[:, :top_k]
    is_candidate_PG = np.zeros((num_preds, num_gts), dtype=np.bool_)
    np.put_along_axis(is_candidate_PG, nearest_Pk, True, axis=1)
    return is_candidate_PG


def pairwise_mask_iou(preds: Outlines, gts: Outlines, resolution: int) -> FloatArray:
    """IoU of the rasterised outlines of every pair, as pycocotools computes it.

    Each outline is encoded once. The mask of a box is a rectangle of whole pixels, so two boxes are compared
    through the pixel boxes of their masks: pycocotools' box IoU divides the same integer counts, many times
    faster when masks are large and overlap. A pair with a polygon goes through the run-length masks.

    resolution: canvas side R in pixels.  Returns float64 [P, G] in [0, 1].
    """
    iou_PG = np.zeros((len(preds), len(gts)))
    if not iou_PG.size:
        return iou_PG
    masks_P, masks_G = _encode(preds, resolution), _encode(gts, resolution)
    boxes_P, polygons_P = np.flatnonzero(preds.is_box), np.flatnonzero(~preds.is_box)
    boxes_G, polygons_G = np.flatnonzero(gts.is_box), np.flatnonzero(~gts.is_box)
    iou_PG[np.ix_(boxes_P, boxes_G)] = _iou(_pixel_boxes(masks_P, boxes_P), _pixel_boxes(masks_G, boxes_G))
    iou_PG[np.ix_(boxes_P, polygons_G)] = _iou(_take(masks_P, boxes_P), _take(masks_G, polygons_G))
    iou_PG[polygons_P] = _iou(_take(masks_P, polygons_P), masks_G)
    return iou_PG


def augmented_cost(
    mask_iou_PG: FloatArray, feasible_PG: BoolArray, fp_cost: float, fn_cost: float
) -> FloatArray:
    """Square cost [[1 - maskIoU, fp_cost], [fn_cost, 0]]: every object may also stay without a partner.

    Rows are P predictions then G dummies, columns G ground truths then P dummies; infeasible pairs cost inf.
    Returns float64 [P + G, P + G].
    """
    num_preds, num_gts = mask_iou_PG.shape
    cost = np.zeros((num_preds + num_gts, num_preds + num_gts))
    cost[:num_preds, :num_gts] = np.where(feasible_PG, 1.0 - mask_iou_PG, np.inf)
    cost[:num_preds, num_gts:] = fp_cost
    cost[num_preds:, :num_gts] = fn_cost
    return cost


def _check_shape(shape: Shape, where: str) -> None:
    size = len(shape.bins)
    is_valid_box = shape.kind == KIND_BBOX and size == 4
    is_valid_polygon = shape.kind == KIND_POLY and size >= 6 and size % 2 == 0
    if not (is_valid_box or is_valid_polygon):
        raise ContractError(
            f"{where} is a {shape.kind!r} with {size} values: expected a 'bbox_2d' with 4 or a 'poly' "
            "with an even number of at least 6"
        )


def _centre_distance(boxes_N4: FloatArray, boxes_M4: FloatArray) -> FloatArray:
    """Squared distance of box centres in half bins, exact for integer boxes.  float64 [N, M]."""
    doubled_centres_N2 = boxes_N4[:, :2] + boxes_N4[:, 2:]
    doubled_centres_M2 = boxes_M4[:, :2] + boxes_M4[:, 2:]
    squared: FloatArray = ((doubled_centres_N2[:, None] - doubled_centres_M2[None]) ** 2).sum(axis=-1)
    return squared


def _encode(outlines: Outlines, resolution: int) -> list[RunLengthMask]:
    scale = (resolution - 1) / MAX_BIN
    masks: list[RunLengthMask] = coco_mask.frPyObjects(
        [c * scale for c in outlines.corners], resolution, resolution
    )
    return masks


def _take(masks: list[RunLengthMask], indices: IntArray) -> list[RunLengthMask]:
    return [masks[i] for i in indices]


def _pixel_boxes(masks: list[RunLengthMask], indices: IntArray) -> FloatArray:
    """Boxes xywh in canvas pixels around the masks at `indices` (0 everywhere for an empty mask).  [N, 4]."""
    if not len(indices):
        return np.zeros((0, 4))
    boxes_xywh: FloatArray = coco_mask.toBbox(_take(masks, indices))
    return boxes_xywh


def _iou(masks_N: list[RunLengthMask] | FloatArray, masks_M: list[RunLengthMask] | FloatArray) -> FloatArray:
    """pycocotools IoU of every pair (run-length masks, or pixel boxes xywh); also for N = 0 or M = 0."""
    if not len(masks_N) or not len(masks_M):
        return np.zeros((len(masks_N), len(masks_M)))
    iou_NM: FloatArray = coco_mask.iou(masks_N, masks_M, [0] * len(masks_M))
    return iou_NM
