"""Plain COCO files of any detector: ground truth (instances) and results (detections), checked and named.

gt = load_ground_truth(Path("instances.json"))
preds = load_results(Path("results.json"), gt, gt_path=Path("instances.json"))
lines = coco_lines(gt, preds)              # the form of `gt_vs_pred_scored.jsonl`, for tables and galleries
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from coordexp.codec.schema import KIND_BBOX
from coordexp.errors import RecordError
from coordexp.eval.coco.checks import (
    CocoDict,
    CocoResults,
    checked_dataset,
    checked_results,
    run_length_mask,
)
from coordexp.eval.predictions.artifacts import COORD_MODE
from coordexp.files import read_json
from coordexp.geometry import xywh_to_xyxy


def load_ground_truth(path: Path, iou_type: str = "bbox") -> CocoDict:
    """A COCO data set as it stands in the file, after its checks (`checked_dataset`).

    Raises RecordError naming file and entry; also for categories without a name or with the same one.
    """
    gt: CocoDict = read_json(path, allow_nan=True)
    with naming(path):
        checked_dataset(gt, iou_type)
        _check_category_names(gt["categories"])
    return gt


def load_results(path: Path, gt: CocoDict, *, gt_path: Path, iou_type: str = "bbox") -> CocoResults:
    """A COCO results list as it stands in the file, after its checks against the ground truth.

    Raises RecordError naming file and entry, and how many results are of images that `gt` does not hold.
    """
    preds: CocoResults = read_json(path, allow_nan=True)
    if not isinstance(preds, list) or not all(isinstance(pred, dict) for pred in preds):
        raise RecordError(
            f"{path}: expected a list of results, each with image_id, category_id, bbox or segmentation, score."
        )
    image_ids = {image["id"] for image in gt["images"]}
    strangers = [
        i for i, pred in enumerate(preds) if "image_id" in pred and pred["image_id"] not in image_ids
    ]
    if strangers:
        raise RecordError(
            f"{path}: preds[{strangers[0]}].image_id is {preds[strangers[0]]['image_id']!r}, which is not among the "
            f"{len(image_ids)} images of {gt_path} ({len(strangers)} of {len(preds)} results are of other images): "
            "give the results of this data set."
        )
    with naming(path):
        checked_results(preds, checked_dataset(gt, iou_type), iou_type)
    return preds


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file in front of a RecordError raised inside."""
    try:
        yield
    except RecordError as error:
        raise RecordError(f"{path}: {error}") from None


def coco_lines(gt: CocoDict, preds: CocoResults) -> list[dict[str, Any]]:
    """One line per image as in `gt_vs_pred_scored.jsonl`; a crowd region has `"crowd": true`.

    Objects are boxes: a result without `bbox` gets the box around its mask.
    """
    names = {category["id"]: category["name"] for category in gt["categories"]}
    truths: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in gt["annotations"]:
        truth = _box_object(names[annotation["category_id"]], annotation["bbox"])
        if annotation.get("iscrowd"):
            truth["crowd"] = True
        truths[annotation["image_id"]].append(truth)
    images = {image["id"]: image for image in gt["images"]}
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for pred in preds:
        box = pred["bbox"] if "bbox" in pred else _mask_box(pred, images[pred["image_id"]])
        prediction = _box_object(names[pred["category_id"]], box)
        found[pred["image_id"]].append({**prediction, "score": float(pred["score"])})
    return [
        {
            "image_id": image_id,
            "image": image.get("file_name", ""),
            "width": image.get("width"),
            "height": image.get("height"),
            "coord_mode": COORD_MODE,
            "gt": truths[image_id],
            "pred": found[image_id],
        }
        for image_id, image in images.items()
    ]


def _box_object(desc: str, box_xywh: Sequence[float]) -> dict[str, Any]:
    return {"type": KIND_BBOX, "points": xywh_to_xyxy(box_xywh).tolist(), "desc": desc}


def _mask_box(pred: Mapping[str, Any], image: Mapping[str, Any]) -> list[float]:
    box: list[float] = coco_mask.toBbox(
        run_length_mask(pred["segmentation"], image["height"], image["width"])
    ).tolist()
    return box


def _check_category_names(categories: Sequence[Mapping[str, Any]]) -> None:
    seen: dict[str, int] = {}
    for index, category in enumerate(categories):
        name = category.get("name")
        if not isinstance(name, str) or not name:
            raise RecordError(f"gt categories[{index}] (id {category['id']}) has no name")
        if name in seen:
            raise RecordError(
                f"gt categories[{index}] and [{seen[name]}] are both named {name!r}: names must be unique"
            )
        seen[name] = index
