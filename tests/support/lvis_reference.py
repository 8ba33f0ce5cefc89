"""Random federated data, and the numbers of the lvis package on it.

The package was written for a numpy that had `numpy.float`; callers put it back for the time of the test.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np


def random_lvis(seed: int, *, num_images: int = 30, num_categories: int = 12, crowded: bool = False):
    """An LVIS data set and results near the truth, with tied scores; crowded: with images of over 300 results."""
    rng = np.random.default_rng(seed)
    category_ids = rng.permutation(np.arange(3, 3 + 2 * num_categories, 2)).tolist()
    categories = [
        {"id": number, "name": f"class_{number}", "frequency": "rcf"[index % 3]}
        for index, number in enumerate(category_ids)
    ]
    images, annotations, preds = [], [], []
    for image_id in (rng.permutation(num_images) * 7 + 4).tolist():
        negative = rng.choice(category_ids, 2, replace=False).tolist()
        positive = [number for number in category_ids if number not in negative and rng.random() < 0.3]
        images.append(
            {
                "id": image_id, "width": 640, "height": 480, "coco_url": f"http://x/val/{image_id}.jpg",
                "neg_category_ids": negative,
                "not_exhaustive_category_ids": [number for number in positive if rng.random() < 0.3],
            }
        )  # fmt: skip
        for number in positive:
            for _ in range(rng.integers(1, 4)):
                size = rng.choice([12.0, 60.0, 200.0]) * rng.uniform(0.5, 1.5, 2)
                box = [*rng.uniform(0, 300, 2).tolist(), *size.tolist()]
                annotations.append(
                    {
                        "id": len(annotations) + 1, "image_id": image_id, "category_id": number, "bbox": box,
                        "area": box[2] * box[3] * 0.7, "segmentation": [_outline(box)],
                    }
                )  # fmt: skip
                for _ in range(rng.integers(0, 4)):
                    near = (np.array(box) + rng.normal(0, 0.06, 4) * size.max()).tolist()
                    near[2:] = [max(1.0, side) for side in near[2:]]
                    preds.append(_result(image_id, number, near, round(float(rng.random()), 1)))
        for _ in range(400 if crowded and rng.random() < 0.3 else 8):
            box = [*rng.uniform(0, 300, 2).tolist(), *rng.uniform(1, 200, 2).tolist()]
            preds.append(_result(image_id, int(rng.choice(category_ids)), box, round(float(rng.random()), 2)))
    preds = [preds[index] for index in rng.permutation(len(preds))]
    return {"images": images, "annotations": annotations, "categories": categories}, preds


def lvis_directly(gt: dict, preds: list, folder: Path, iou_type: str = "bbox"):
    """The evaluator of the lvis package after its run: `.results`, `.eval`."""
    from lvis import LVIS, LVISEval, LVISResults

    (folder / "lvis_reference.json").write_text(json.dumps(gt))
    truth = LVIS(str(folder / "lvis_reference.json"))
    evaluator = LVISEval(truth, LVISResults(truth, copy.deepcopy(preds)), iou_type)
    evaluator.run()
    return evaluator


def _result(image_id: int, category_id: int, box: list[float], score: float) -> dict:
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": box,
        "score": score,
        "segmentation": [_outline(box)],
    }


def _outline(box: list[float]) -> list[float]:
    x, y, width, height = box
    return [x, y, x, y + height, x + width, y + height, x + width, y]
