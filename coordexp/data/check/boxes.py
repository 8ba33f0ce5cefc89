"""What boxes look like that are not what they are read as: 0..1, corners, another picture's size, drawn twice."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from coordexp.data.check.findings import Finding, Level, found
from coordexp.errors import RecordError
from coordexp.eval.coco.annotations import BoolArray, Dataset
from coordexp.eval.coco.segmentation import is_run_length, outline_box
from coordexp.geometry import FloatArray, IntArray, xywh_to_xyxy

MAX_SHARE = 1.05
"""Boxes in shares of a picture's size end at 1; a few exporters overshoot."""
DUPLICATE_IOU = 0.9
_MAX_SHIFT = (1 - DUPLICATE_IOU) / DUPLICATE_IOU
"""Of left edges, in widths of the box, that leaves such an IoU possible."""
_SLACK_PX, _SLACK_SHARE = 2.0, 0.02
_MIN_BOXES_FOR_COVERAGE = 50
_UPPER_LEFT = 0.4
_MAX_OUTLINES = 2000


def box_findings(dataset: Dataset) -> list[Finding]:
    """Everything that the numbers of the boxes alone give away."""
    if not len(dataset):
        return []
    boxes = dataset.boxes_xywh_M4
    has_extent: BoolArray = np.asarray((boxes[:, 2:] > 0).all(axis=1))
    findings: list[Finding | None] = [_normalised(dataset), _corners(dataset)]
    if findings == [None, None]:
        findings += [*_frame(dataset, has_extent), _coverage(dataset, has_extent)]
    findings += [_no_extent(dataset, has_extent), *_duplicates(dataset)]
    return [finding for finding in findings if finding is not None]


def duplicate_pairs(dataset: Dataset) -> IntArray:
    """Pairs of annotations of one image, no crowds, that overlap by more than `DUPLICATE_IOU`.  int64 [P, 2]."""
    has_extent = (dataset.boxes_xywh_M4[:, 2:] > 0).all(axis=1) & ~dataset.crowd_M
    rows = np.flatnonzero(has_extent)
    rows = rows[np.lexsort((dataset.boxes_xywh_M4[rows, 0], dataset.image_M[rows]))]
    pairs = list(_overlapping(rows, dataset.image_M[rows], xywh_to_xyxy(dataset.boxes_xywh_M4[rows])))
    if not pairs:
        return np.zeros((0, 2), dtype=np.int64)
    both = np.sort(np.concatenate(pairs), axis=1)
    order: IntArray = both[np.lexsort((both[:, 1], both[:, 0]))]
    return order


def _overlapping(rows: IntArray, image_M: IntArray, boxes_xyxy_M4: FloatArray) -> Iterator[IntArray]:
    """Overlapping pairs of rows, at one distance in the order of (image, left edge) after the other."""
    sides = boxes_xyxy_M4[:, 2:] - boxes_xyxy_M4[:, :2]
    areas = sides.prod(axis=1)
    first = np.arange(len(rows))
    for distance in range(1, len(rows)):
        first = first[first + distance < len(rows)]
        second = first + distance
        # Sorted by the left edge: once it is too far away for that overlap, so are all that follow.
        near = boxes_xyxy_M4[second, 0] - boxes_xyxy_M4[first, 0] <= _MAX_SHIFT * sides[first, 0]
        alive = (image_M[first] == image_M[second]) & near
        first, second = first[alive], second[alive]
        if not len(first):
            return
        low = np.maximum(boxes_xyxy_M4[first, :2], boxes_xyxy_M4[second, :2])
        high = np.minimum(boxes_xyxy_M4[first, 2:], boxes_xyxy_M4[second, 2:])
        shared = np.clip(high - low, 0, None).prod(axis=1)
        hits = shared > DUPLICATE_IOU * (areas[first] + areas[second] - shared)
        if hits.any():
            yield np.stack([rows[first[hits]], rows[second[hits]]], axis=1)


def _normalised(dataset: Dataset) -> Finding | None:
    boxes = dataset.boxes_xywh_M4
    small = (boxes >= 0).all(axis=1) & (boxes <= MAX_SHARE).all(axis=1) & (boxes[:, 2:] > 0).all(axis=1)
    sizes = dataset.sizes_N2[dataset.image_M]
    small &= ((sizes == 0) | (sizes > 4)).all(axis=1)
    if not (boxes[small] % 1).any():  # whole pixels
        return None
    level = Level.ERROR if small.mean() >= 0.9 else Level.WARNING
    return _of_boxes(
        dataset, small, level, "normalised_boxes",
        f"{{count}} of {len(dataset)} boxes [lies|lie] within 0..1 and [looks|look] normalised (shares of the "
        "picture's size), where pixels are expected. Multiply by width and height",
    )  # fmt: skip


def _corners(dataset: Dataset) -> Finding | None:
    """Are boxes x1, y1, x2, y2, read as x, y, width, height?"""
    x, y, c, d = dataset.boxes_xywh_M4.T
    sizes = dataset.sizes_N2[dataset.image_M].astype(np.float64)
    known = (sizes > 0).all(axis=1)
    slack = np.maximum(_SLACK_PX, _SLACK_SHARE * sizes)
    are_corners = (c > x) & (d > y) & (~known | ((c <= sizes[:, 0] + 1) & (d <= sizes[:, 1] + 1)))
    if are_corners.mean() < 0.95:
        return None
    beyond = known & ((x + c > sizes[:, 0] + slack[:, 0]) | (y + d > sizes[:, 1] + slack[:, 1]))
    by_area = _is_near(dataset.area_M, (c - x) * (d - y)) & ~_is_near(dataset.area_M, c * d)
    by_outline, num_outlines = _outlines_end_at_corners(dataset)
    reasons = [
        (beyond & are_corners, len(dataset), "[reaches|reach] beyond [its|their] picture", 0.1),
        (by_area & are_corners, len(dataset), "[has|have] the area of x1, y1, x2, y2", 0.5),
        (by_outline & are_corners, num_outlines, "[ends|end] where [its|their] outline does", 0.5),
    ]
    for evidence, total, what, least in reasons:
        count = int(evidence.sum())
        if count and count >= least * total and (count >= 3 or count == total):
            return _of_boxes(
                dataset, evidence, Level.ERROR, "boxes_are_corners",
                f"boxes look like corners (x1, y1, x2, y2), and x, y, width, height is expected: {{count}} of {total} "
                f"{what}. Write width = x2 - x1 and height = y2 - y1",
            )  # fmt: skip
    return None


def _outlines_end_at_corners(dataset: Dataset) -> tuple[BoolArray, int]:
    """Which boxes end, read as corners, where their outline ends; and of how many that was looked at."""
    agrees = np.zeros(len(dataset), dtype=bool)
    outlined = [m for m, segmentation in enumerate(dataset.segmentations) if segmentation is not None]
    looked_at = 0
    for m in outlined[:: max(1, len(outlined) // _MAX_OUTLINES)]:
        if is_run_length(dataset.segmentations[m]):
            continue
        try:
            x, y, width, height = outline_box(dataset.segmentations[m], 0, 0, "")
        except RecordError:
            continue
        looked_at += 1
        box, ends = dataset.boxes_xywh_M4[m], np.array([x + width, y + height])
        as_sides = np.abs(box[:2] + box[2:] - ends).max()
        agrees[m] = np.abs(box[2:] - ends).max() <= 1 and as_sides > _SLACK_PX
    return agrees, looked_at


def _frame(dataset: Dataset, has_extent: BoolArray) -> list[Finding | None]:
    """Boxes outside of their picture, wholly or in part."""
    sizes = dataset.sizes_N2[dataset.image_M].astype(np.float64)
    known = (sizes > 0).all(axis=1) & has_extent
    boxes = xywh_to_xyxy(dataset.boxes_xywh_M4)
    slack = np.maximum(_SLACK_PX, _SLACK_SHARE * sizes)
    outside = known & ((boxes[:, :2] >= sizes).any(axis=1) | (boxes[:, 2:] <= 0).any(axis=1))
    beyond = known & ~outside & ((boxes[:, :2] < -slack) | (boxes[:, 2:] > sizes + slack)).any(axis=1)
    hint = ". Were they drawn on a larger picture?" if (outside | beyond).mean() >= 0.1 else ""
    return [
        _of_boxes(
            dataset, outside, Level.WARNING, "boxes_outside",
            f"{{count}} [box lies|boxes lie] outside of [its|their] picture and [is|are] left out{hint}",
        ),
        _of_boxes(
            dataset, beyond, Level.WARNING, "boxes_beyond",
            f"{{count}} [box reaches|boxes reach] beyond [its|their] picture and [is|are] cut at its border{hint}",
        ),
    ]  # fmt: skip


def _coverage(dataset: Dataset, has_extent: BoolArray) -> Finding | None:
    """Do all boxes lie in one corner, as those of a smaller picture or in per cent do?"""
    sizes = dataset.sizes_N2[dataset.image_M].astype(np.float64)
    known = (sizes > 0).all(axis=1) & has_extent
    if known.sum() < _MIN_BOXES_FOR_COVERAGE:
        return None
    ends = xywh_to_xyxy(dataset.boxes_xywh_M4)[known, 2:]
    furthest = (ends / sizes[known]).max(axis=0)
    if (furthest >= _UPPER_LEFT).any():
        return None
    return Finding(
        Level.WARNING,
        "boxes_in_one_corner",
        f"all {int(known.sum())} boxes end within {furthest[0]:.0%} of the width and {furthest[1]:.0%} of the height "
        f"of their picture (largest values {ends[:, 0].max():.0f} and {ends[:, 1].max():.0f}). Were they drawn on a "
        "smaller picture, or are they in per cent?",
        int(known.sum()),
    )


def _no_extent(dataset: Dataset, has_extent: BoolArray) -> Finding | None:
    return _of_boxes(
        dataset, ~has_extent, Level.WARNING, "boxes_without_extent",
        "{count} [box has|boxes have] no width or no height and [is|are] left out",
    )  # fmt: skip


def _duplicates(dataset: Dataset) -> list[Finding | None]:
    pairs = duplicate_pairs(dataset)
    same = dataset.category_M[pairs[:, 0]] == dataset.category_M[pairs[:, 1]]

    def name(pair: int) -> str:
        first, second = pairs[pair].tolist()
        return f"{dataset.entry(first)} and {dataset.entry(second)}"

    return [
        found(
            Level.WARNING, kind,
            f"{{count}} [pair of boxes of {whose} overlaps|pairs of boxes of {whose} overlap] by more "
            f"than {DUPLICATE_IOU} (IoU)",
            np.flatnonzero(chosen).tolist(), name, dataset.image_M[pairs[chosen, 0]].tolist(),
        )
        for kind, chosen, whose in (
            ("duplicate_boxes", same, "one description"),
            ("boxes_of_two_names", ~same, "different descriptions"),
        )
    ]  # fmt: skip


def _of_boxes(
    dataset: Dataset, which_M: NDArray[np.bool_], level: Level, kind: str, message: str
) -> Finding | None:
    rows = np.flatnonzero(which_M).tolist()
    return found(level, kind, message, rows, dataset.entry, dataset.image_M[rows].tolist())


def _is_near(found_M: FloatArray, expected_M: FloatArray) -> BoolArray:
    near: BoolArray = np.abs(found_M - expected_M) <= 1e-3 * np.maximum(1.0, np.abs(expected_M))
    return near
