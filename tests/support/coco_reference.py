"""Random COCO data, and independent references for its numbers."""

from __future__ import annotations

import contextlib
import copy
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

IOU_THRESHOLDS = [0.5 + 0.05 * i for i in range(10)]


def random_pair(num_images: int, seed: int) -> tuple[dict, list]:
    """A data set with crowds, empty images and all sizes; results near the truth, with tied scores."""
    rng = np.random.default_rng(seed)
    images = [{"id": 10 * i + 3, "width": 640, "height": 480} for i in range(num_images)]
    categories = [{"id": 5, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 9, "name": "never annotated"}]
    annotations, preds = [], []
    for image in images[: -max(1, num_images // 10)]:
        for _ in range(rng.integers(0, 7)):
            size = rng.choice([12.0, 60.0, 200.0]) * rng.uniform(0.5, 1.5, 2)
            x, y = rng.uniform(0, 400, 2)
            box = [float(x), float(y), float(size[0]), float(size[1])]
            category = int(rng.choice([5, 2]))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3] * 0.7,
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
            for _ in range(rng.integers(0, 4)):
                near = [float(value) for value in np.array(box) + rng.normal(0, 0.06, 4) * max(size)]
                category_id = category if rng.random() < 0.9 else 9
                score = round(float(rng.random()), 1)
                near[2:] = [max(1.0, side) for side in near[2:]]
                preds.append(
                    {"image_id": image["id"], "category_id": category_id, "bbox": near, "score": score}
                )
    preds += [
        {"image_id": image["id"], "category_id": 5, "bbox": [1.0, 2.0, 50.0, 60.0], "score": 0.5}
        for image in images[::7]
    ]
    gt = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    return gt, [preds[i] for i in rng.permutation(len(preds))]


def pycocotools_directly(
    gt: dict,
    preds: list,
    iou_type: str = "bbox",
    *,
    max_dets: list[int] | None = None,
    category_ids: list[int] | None = None,
) -> list[float]:
    """The 12 numbers of pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco_gt = COCO()
        coco_gt.dataset = copy.deepcopy(gt)
        coco_gt.createIndex()
        evaluator = COCOeval(coco_gt, coco_gt.loadRes(copy.deepcopy(preds)), iou_type)
        evaluator.params.maxDets = max_dets or evaluator.params.maxDets
        evaluator.params.catIds = category_ids or evaluator.params.catIds
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return [float(value) for value in evaluator.stats]


def brute_force_ap(gt: dict, preds: list) -> float:
    """AP over IoU 0.50:0.05:0.95 by definition: greedy matching by score, precision at 101 recalls."""

    def iou(a, b, is_crowd):
        width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
        height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
        shared = max(width, 0) * max(height, 0)
        return shared / (a[2] * a[3] if is_crowd else a[2] * a[3] + b[2] * b[3] - shared)

    def flags(threshold, category, image):
        """(score, is true positive or None for ignored) of the image's detections, best score first."""
        truths = [a for a in gt["annotations"] if (a["image_id"], a["category_id"]) == (image, category)]
        found = [p for p in preds if (p["image_id"], p["category_id"]) == (image, category)]
        taken, result = set(), []
        for pred in sorted(found, key=lambda p: -p["score"])[:100]:
            overlaps = [iou(pred["bbox"], t["bbox"], t["iscrowd"]) for t in truths]
            regular = [j for j, t in enumerate(truths) if not t["iscrowd"] and j not in taken]
            hits = [j for j in regular if overlaps[j] >= threshold]
            if hits:
                best = max(hits, key=lambda j: (overlaps[j], j))
                taken.add(best)
                result.append((pred["score"], True))
            elif any(t["iscrowd"] and o >= threshold for t, o in zip(truths, overlaps, strict=True)):
                result.append((pred["score"], None))
            else:
                result.append((pred["score"], False))
        return result

    aps = []
    for category in (c["id"] for c in gt["categories"]):
        num_gt = sum(a["category_id"] == category and not a["iscrowd"] for a in gt["annotations"])
        if not num_gt:
            continue
        for threshold in IOU_THRESHOLDS:
            ranked = [flag for image in gt["images"] for flag in flags(threshold, category, image["id"])]
            ranked = [hit for _, hit in sorted(ranked, key=lambda flag: -flag[0]) if hit is not None]
            hits = np.cumsum(ranked) if ranked else np.zeros(0)
            precision = hits / np.arange(1, len(hits) + 1)
            recall = hits / num_gt
            points = [max(precision[recall >= r], default=0.0) for r in np.linspace(0, 1, 101)]
            aps.append(np.mean(points))
    return float(np.mean(aps))
