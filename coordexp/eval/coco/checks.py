"""Checked copies of COCO ground truth and results; every error names the entry that is at fault.

The caller's dicts are left alone: the engines write into the annotations they are given.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from typing import Any

from pycocotools import mask as coco_mask

from coordexp.errors import RecordError

CocoDict = dict[str, Any]
CocoResults = list[dict[str, Any]]


def checked_dataset(gt: Mapping[str, Any], iou_type: str = "bbox") -> CocoDict:
    """A checked copy one level deep, annotations renumbered from 1; no `iscrowd` is 0, no `area` the box area.

    pycocotools takes annotation id 0 for "unmatched", so ids of the file are not used.
    Raises RecordError naming the entry: repeated ids, unknown images or categories, malformed boxes, and for
    iou_type "segm" an annotation without segmentation or an image without size.
    """
    if not isinstance(gt, Mapping):
        raise RecordError("the COCO ground truth is not an object with images, annotations, categories")
    missing = [key for key in ("images", "annotations", "categories") if key not in gt]
    if missing:
        raise RecordError(
            f"the COCO ground truth has no {', '.join(missing)}: expected images, annotations, categories"
        )
    image_ids = unique_ids(gt["images"], "images")
    category_ids = unique_ids(gt["categories"], "categories")
    annotations = []
    for index, annotation in enumerate(gt["annotations"]):
        where = f"gt annotations[{index}]"
        _check_reference(annotation, "image_id", image_ids, where)
        _check_reference(annotation, "category_id", category_ids, where)
        box = _finite_box(annotation, where)
        if iou_type == "segm" and not annotation.get("segmentation"):
            raise RecordError(
                f"{where} (id {annotation.get('id')}) has no segmentation, which segm needs in every annotation: "
                "evaluate boxes (bbox) instead, or add the outlines"
            )
        defaults = {"iscrowd": 0, "area": box[2] * box[3]}
        annotations.append({**defaults, **annotation, "bbox": box, "id": index + 1})
    if iou_type == "segm":
        _check_sizes(gt["images"])
    return {
        "info": {},
        "images": [dict(image) for image in gt["images"]],
        "categories": [dict(category) for category in gt["categories"]],
        "annotations": annotations,
    }


def checked_results(preds: Sequence[Mapping[str, Any]], dataset: CocoDict, iou_type: str) -> CocoResults:
    """Checked copies of the results; without boxes, polygons become run-length masks as `loadRes` expects.

    dataset: from `checked_dataset`.  Raises RecordError naming the index of a result of an unknown image or
    category, without a finite score, or without the geometry that `iou_type` needs.
    """
    sizes = {image["id"]: (image.get("height"), image.get("width")) for image in dataset["images"]}
    category_ids = {category["id"] for category in dataset["categories"]}
    every_box = all("bbox" in pred for pred in preds)
    results = []
    for index, pred in enumerate(preds):
        where = f"preds[{index}]"
        _check_reference(pred, "image_id", sizes, where)
        _check_reference(pred, "category_id", category_ids, where)
        copy = {**pred, "score": finite_score(pred.get("score"), where)}
        if iou_type == "bbox" or every_box:
            copy["bbox"] = _finite_box(pred, where)
        elif "segmentation" not in pred:
            raise RecordError(
                f"{where} has no segmentation: expected one in every result, or a bbox in every result"
            )
        else:
            copy.pop("bbox", None)
            copy["segmentation"] = run_length_mask(pred["segmentation"], *sizes[pred["image_id"]])
        results.append(copy)
    return results


def unique_ids(entries: Sequence[Mapping[str, Any]], what: str) -> set[int]:
    """The ids of images or categories; RecordError naming the entry that repeats or lacks one."""
    ids: set[int] = set()
    for index, entry in enumerate(entries):
        if "id" not in entry:
            raise RecordError(f"gt {what}[{index}] has no id")
        if entry["id"] in ids:
            raise RecordError(f"gt {what}[{index}] repeats id {entry['id']}: ids must be unique")
        ids.add(entry["id"])
    return ids


def finite_score(score: object, where: str) -> float:
    """`score` as a float; RecordError if there is none or it is no finite number."""
    if type(score) is float and math.isfinite(score):  # by far the usual case
        return score
    if score is None:
        raise RecordError(
            f"{where} has no score: COCO evaluation needs scored detections (`coordexp score` adds them)"
        )
    if isinstance(score, bool) or not isinstance(score, Real) or not math.isfinite(score):
        raise RecordError(f"{where}.score is {score}: expected a finite number")
    return float(score)


def run_length_mask(segmentation: Any, height: int, width: int) -> Any:
    """A polygon list, an uncompressed or a compressed run length as a compressed run length of pycocotools."""
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation


def _check_sizes(images: Sequence[Mapping[str, Any]]) -> None:
    for index, image in enumerate(images):
        if not image.get("width") or not image.get("height"):
            raise RecordError(
                f"gt images[{index}] (id {image['id']}) has no width and height, which segm needs to draw masks"
            )


def _check_reference(entry: Mapping[str, Any], key: str, known: Collection[Any], where: str) -> None:
    if key not in entry:
        raise RecordError(f"{where} has no {key}")
    if entry[key] not in known:
        kind = "images" if key == "image_id" else "categories"
        raise RecordError(
            f"{where}.{key} is {entry[key]!r}, not one of the {len(known)} {kind} of the ground truth: "
            "are these results of another data set?"
        )


def _finite_box(entry: Mapping[str, Any], where: str) -> list[float]:
    box = entry.get("bbox")
    try:
        x, y, width, height = box  # type: ignore[misc]
        fits = math.isfinite(x + y + width + height) and width >= 0 and height >= 0
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise RecordError(
            f"{where}.bbox is {box!r}: expected 4 finite pixel values (x, y, width >= 0, height >= 0)"
        )
    return [float(x), float(y), float(width), float(height)]
