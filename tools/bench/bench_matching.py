"""How long matching one image takes, beside the same matching written pair by pair.

    OMP_NUM_THREADS=1 python tools/bench/bench_matching.py [--repeats 30]

Prints one line per scene: median milliseconds of `match_objects`, of the per-pair version, and their ratio.
Milliseconds are CPU time of this process, so a busy neighbour does not count. Both versions must return the
same pairs, or the bench stops.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from pycocotools import mask as coco_mask
from scipy.optimize import linear_sum_assignment

from coordexp.codec.schema import BoxObject
from coordexp.matching import match_objects

RESOLUTION, TOP_K, GATE = 256, 10, 0.3

SCENES = [
    # name, objects on each side, side lengths in bins, share of polygons
    ("100 x 100 boxes", 100, (20, 300), 0.0),
    ("300 x 300 boxes", 300, (20, 300), 0.0),
    ("100 x 100 large overlapping boxes", 100, (500, 900), 0.0),
    ("300 x 300 large overlapping boxes", 300, (500, 900), 0.0),
    ("100 x 100, half polygons", 100, (20, 300), 0.5),
    ("300 x 300, half polygons", 300, (20, 300), 0.5),
]


def scene(
    count: int, sides: tuple[int, int], polygon_share: float
) -> tuple[list[BoxObject], list[BoxObject]]:
    """Random ground truths, and predictions that are the same shapes moved by up to 30 bins per corner."""
    rng = np.random.default_rng(0)
    centres, sizes = rng.uniform(0, 999, (count, 2)), rng.uniform(*sides, (count, 2))
    gt_boxes = np.clip(np.concatenate([centres - sizes / 2, centres + sizes / 2], axis=1), 0, 999)
    pred_boxes = np.clip(gt_boxes + rng.integers(-30, 31, gt_boxes.shape), 0, 999)
    is_polygon = rng.random(count) < polygon_share
    return tuple(
        [_shape(box, polygon) for box, polygon in zip(boxes, is_polygon, strict=True)]
        for boxes in (pred_boxes, gt_boxes)
    )


def _shape(box: np.ndarray, is_polygon: bool) -> BoxObject:
    x1, x2 = sorted(int(value) for value in box[::2])
    y1, y2 = sorted(int(value) for value in box[1::2])
    if not is_polygon:
        return BoxObject("thing", "bbox_2d", (x1, y1, x2, y2))
    x, y = (x1 + x2) // 2, (y1 + y2) // 2
    return BoxObject("thing", "poly", (x, y1, x2, y, x, y2, x1, y))


def match_pair_by_pair(preds: list[BoxObject], gts: list[BoxObject]) -> list[tuple[int, int]]:
    """The same rules, one pair at a time: box IoU in Python, both shapes rasterised for every candidate."""
    cost = np.zeros((len(preds) + len(gts),) * 2)
    cost[: len(preds), : len(gts)] = np.inf
    cost[: len(preds), len(gts) :] = 1.0
    cost[len(preds) :, : len(gts)] = 1.0
    for p, pred in enumerate(preds):
        ious = [_box_iou(_extent(pred), _extent(gt)) for gt in gts]
        keys = [-iou for iou in ious] if max(ious) > 0 else [_centre_distance(pred, gt) for gt in gts]
        for g in sorted(range(len(gts)), key=keys.__getitem__)[:TOP_K]:
            mask_iou = coco_mask.iou([_encode(pred)], [_encode(gts[g])], [0]).item()
            if mask_iou >= GATE:
                cost[p, g] = 1.0 - mask_iou
    rows, columns = linear_sum_assignment(cost)
    pairs = zip(rows.tolist(), columns.tolist(), strict=True)
    return [(p, g) for p, g in pairs if p < len(preds) and g < len(gts)]


def _extent(shape: BoxObject) -> tuple[int, int, int, int]:
    xs, ys = shape.bins[::2], shape.bins[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def _box_iou(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union else 0.0


def _centre_distance(a: BoxObject, b: BoxObject) -> float:
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = _extent(a), _extent(b)
    return (ax1 + ax2 - bx1 - bx2) ** 2 + (ay1 + ay2 - by1 - by2) ** 2


def _encode(shape: BoxObject) -> dict:
    corners = shape.bins
    if shape.kind == "bbox_2d":
        x1, y1, x2, y2 = corners
        corners = (x1, y1, x2, y1, x2, y2, x1, y2)
    scaled = [value * (RESOLUTION - 1) / 999 for value in corners]
    return coco_mask.frPyObjects([scaled], RESOLUTION, RESOLUTION)[0]


def median_ms(call: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return 1e3 * statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of match_objects per scene")
    repeats = parser.parse_args().repeats
    slow_repeats = max(3, repeats // 10)
    print(f"R {RESOLUTION}, top_k {TOP_K}, gate {GATE}; medians of {repeats} calls, per pair {slow_repeats}")
    print(f"{'scene':36}{'matched':>8}{'ours ms':>10}{'per pair ms':>13}{'ratio':>8}")
    for name, count, sides, polygon_share in SCENES:
        preds, gts = scene(count, sides, polygon_share)
        match = match_objects(preds, gts, top_k=TOP_K, gate=GATE, resolution=RESOLUTION)
        per_pair = match_pair_by_pair(preds, gts)
        if match.matched != per_pair:
            raise SystemExit(f"{name}: match_objects and the per-pair version disagree on the pairs")
        ours_ms = median_ms(lambda p=preds, g=gts: match_objects(p, g), repeats)
        per_pair_ms = median_ms(lambda p=preds, g=gts: match_pair_by_pair(p, g), slow_repeats)
        print(
            f"{name:36}{len(match.matched):8}{ours_ms:10.2f}{per_pair_ms:13.1f}{per_pair_ms / ours_ms:8.1f}"
        )


if __name__ == "__main__":
    main()
