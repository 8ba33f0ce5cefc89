"""COCO average precision and recall, by pycocotools or faster-coco-eval.

    metrics = evaluate_coco(gt, preds)                    # {"AP": 0.505, "AP50": 0.697, ...}
    evaluation = run_coco(gt, preds, engine="faster-coco-eval")
    evaluation.per_category_ap()                          # {"cat": 0.61, ...}

`gt` is a COCO dataset dict (images, annotations, categories), `preds` a COCO results list (image_id,
category_id, bbox xywh in pixels, score). The inputs are never changed, and nothing is printed.
`to_coco` builds both from plain per-image detections.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from coordexp.errors import ConfigError, RecordError
from coordexp.geometry import FloatArray, box_polygon, polygon_area, polygon_box, xyxy_to_xywh

ENGINES = ("pycocotools", "faster-coco-eval")
IOU_TYPES = ("bbox", "segm")

METRIC_NAMES = (
    "AP",  # mean over IoU 0.50:0.05:0.95, at most 100 detections per image
    "AP50",
    "AP75",
    "AP_small",  # ground truth area below 32 x 32 pixels
    "AP_medium",  # 32 x 32 to 96 x 96
    "AP_large",  # above
    "AR1",  # mean over IoU 0.50:0.05:0.95, at most 1 detection per image and category
    "AR10",
    "AR100",
    "AR_small",
    "AR_medium",
    "AR_large",
)
"""Keys of the 12 COCO numbers, in the order of pycocotools' `stats`. -1: no ground truth to measure on."""

CocoDict = dict[str, Any]
CocoResults = list[dict[str, Any]]


@dataclass(frozen=True)
class CocoEvaluation:
    """One evaluation: the 12 numbers, and the tables they were averaged from (-1: no ground truth).

    precision: float64 [T, R, K, A, M], recall: float64 [T, K, A, M], iou_thresholds: [T], recall_points: [R].
    T = 10 IoU thresholds, R = 101 recall points, K = categories by ascending id (`category_names`), A = areas
    (all, small, medium, large), M = detection limits (1, 10, 100).
    """

    metrics: dict[str, float]
    precision: FloatArray
    recall: FloatArray
    category_names: list[str]
    iou_thresholds: FloatArray
    recall_points: FloatArray

    def per_category_ap(self) -> dict[str, float]:
        """AP over IoU 0.50:0.05:0.95 by category name; categories without ground truth are left out."""
        all_areas, most_detections = 0, -1
        aps: dict[str, float] = {}
        for k, name in enumerate(self.category_names):
            precision_TR = self.precision[:, :, k, all_areas, most_detections]
            if (precision_TR > -1).any():
                aps[name] = float(precision_TR[precision_TR > -1].mean())
        return aps


def evaluate_coco(
    gt: Mapping[str, Any],
    preds: Sequence[Mapping[str, Any]],
    *,
    iou_type: str = "bbox",
    engine: str = "pycocotools",
) -> dict[str, float]:
    """The 12 COCO numbers under `METRIC_NAMES`, equal to those of the engine run directly.

    gt: COCO dataset (a missing `iscrowd` is 0, a missing `area` the box area).  preds: COCO results or [].
    iou_type: "bbox" or "segm".  engine: "pycocotools" or "faster-coco-eval".
    Raises ConfigError for an unknown engine or iou_type, RecordError naming the index of a malformed entry.
    """
    return run_coco(gt, preds, iou_type=iou_type, engine=engine).metrics


def run_coco(
    gt: Mapping[str, Any],
    preds: Sequence[Mapping[str, Any]],
    *,
    iou_type: str = "bbox",
    engine: str = "pycocotools",
) -> CocoEvaluation:
    """As `evaluate_coco`, with the precision and recall tables for curves and per-category numbers."""
    if engine not in ENGINES:
        raise ConfigError(f"engine is {engine!r}: expected one of {', '.join(ENGINES)}")
    if iou_type not in IOU_TYPES:
        raise ConfigError(f"iou_type is {iou_type!r}: expected one of {', '.join(IOU_TYPES)}")
    dataset = _dataset_copy(gt)
    results = _results_copy(preds, dataset, iou_type)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = _evaluator(dataset, results, iou_type, engine)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    names = {category["id"]: category["name"] for category in dataset["categories"]}
    return CocoEvaluation(
        metrics={name: float(value) for name, value in zip(METRIC_NAMES, evaluator.stats[:12], strict=True)},
        precision=np.asarray(evaluator.eval["precision"]),
        recall=np.asarray(evaluator.eval["recall"]),
        category_names=[names[category_id] for category_id in sorted(names)],
        iou_thresholds=np.asarray(evaluator.params.iouThrs),
        recall_points=np.asarray(evaluator.params.recThrs),
    )


@dataclass(frozen=True)
class ImageDetections:
    """Ground truth and predictions of one image, in pixels.

    gt: (desc, points); pred: (desc, points, score). points: a box xyxy, or a polygon of at least 6 values.
    """

    image_id: int
    width: int
    height: int
    gt: Sequence[tuple[str, Sequence[float]]]
    pred: Sequence[tuple[str, Sequence[float], float]]
    file_name: str = ""


@dataclass(frozen=True)
class CocoExport:
    """`to_coco`'s dataset and results, and what became of descriptions that are no category.

    mapped: predictions given a category through `desc_map`, by their own desc; dropped: those left out.
    """

    gt: CocoDict
    preds: CocoResults
    mapped: Counter[str]
    dropped: Counter[str]


def to_coco(images: Iterable[ImageDetections], desc_map: Mapping[str, str] | None = None) -> CocoExport:
    """Build a COCO dataset and results list; categories are the ground-truth descs, sorted, with ids from 1.

    A predicted desc that is no category goes through `desc_map` (desc -> category name), and is dropped and
    counted if it is not there either. Boxes become xywh with width = x2 - x1 and height = y2 - y1 (no +1).
    A polygon gets a `segmentation` and its surrounding `bbox`, so that the pair serves both iou types.
    Every image stays in, also one without ground truth. Raises RecordError for a repeated image id or a score
    that is not a finite number, ConfigError for a `desc_map` target that is no category.
    """
    images = list(images)
    _unique_ids([{"id": image.image_id} for image in images], "images")
    names = sorted({desc for image in images for desc, _ in image.gt})
    category_ids = {name: category_id for category_id, name in enumerate(names, start=1)}
    desc_map = desc_map or {}
    for desc, name in desc_map.items():
        if name not in category_ids:
            raise ConfigError(
                f"desc_map sends {desc!r} to {name!r}, which is no category of the ground truth"
            )
    annotations = [
        {"id": 0, "image_id": image.image_id, "category_id": category_ids[desc], **_coco_annotation(points)}
        for image in images
        for desc, points in image.gt
    ]
    for annotation_id, annotation in enumerate(annotations, start=1):
        annotation["id"] = annotation_id
    dataset = {
        "images": [
            {"id": image.image_id, "width": image.width, "height": image.height, "file_name": image.file_name}
            for image in images
        ],
        "annotations": annotations,
        "categories": [{"id": category_id, "name": name} for name, category_id in category_ids.items()],
    }
    export = CocoExport(dataset, [], Counter(), Counter())
    for image in images:
        _export_predictions(image, category_ids, desc_map, export)
    return export


def _export_predictions(
    image: ImageDetections, category_ids: Mapping[str, int], desc_map: Mapping[str, str], export: CocoExport
) -> None:
    for index, (desc, points, score) in enumerate(image.pred):
        category = desc if desc in category_ids else desc_map.get(desc)
        if category is None:
            export.dropped[desc] += 1
            continue
        if category != desc:
            export.mapped[desc] += 1
        result = {"image_id": image.image_id, "category_id": category_ids[category], **_coco_result(points)}
        export.preds.append(
            {**result, "score": _finite_score(score, f"image {image.image_id} pred[{index}]")}
        )


def _coco_annotation(points: Sequence[float]) -> CocoDict:
    if len(points) == 4:
        box = xyxy_to_xywh(points).tolist()
        outline, area = box_polygon(points).tolist(), box[2] * box[3]
    else:
        box = xyxy_to_xywh(polygon_box(points)).tolist()
        outline, area = [float(value) for value in points], polygon_area(points)
    return {"bbox": box, "segmentation": [outline], "area": area, "iscrowd": 0}


def _coco_result(points: Sequence[float]) -> CocoDict:
    if len(points) == 4:
        return {"bbox": xyxy_to_xywh(points).tolist()}
    box = xyxy_to_xywh(polygon_box(points)).tolist()
    return {"bbox": box, "segmentation": [[float(value) for value in points]]}


def _evaluator(dataset: CocoDict, results: CocoResults, iou_type: str, engine: str) -> Any:
    if engine == "faster-coco-eval":
        import faster_coco_eval  # loads OpenCV, so only when it is asked for

        coco_gt = faster_coco_eval.COCO(dataset)
        return faster_coco_eval.COCOeval_faster(coco_gt, coco_gt.loadRes(results), iouType=iou_type)
    coco_gt = COCO()
    coco_gt.dataset = dataset
    coco_gt.createIndex()
    return COCOeval(coco_gt, coco_gt.loadRes(results) if results else _no_results(dataset), iouType=iou_type)


def _no_results(dataset: CocoDict) -> COCO:
    """What `loadRes` would give for an empty list, which pycocotools refuses."""
    coco_dt = COCO()
    coco_dt.dataset = {"images": dataset["images"], "categories": dataset["categories"], "annotations": []}
    coco_dt.createIndex()
    return coco_dt


def _dataset_copy(gt: Mapping[str, Any]) -> CocoDict:
    """A checked copy one level deep (the engines write into annotations), annotations renumbered from 1.

    pycocotools takes annotation id 0 for "unmatched", so ids of the file are not used.
    """
    missing = [key for key in ("images", "annotations", "categories") if key not in gt]
    if missing:
        raise RecordError(
            f"the COCO ground truth has no {', '.join(missing)}: expected images, annotations, categories"
        )
    image_ids = _unique_ids(gt["images"], "images")
    category_ids = _unique_ids(gt["categories"], "categories")
    annotations = []
    for index, annotation in enumerate(gt["annotations"]):
        where = f"gt annotations[{index}]"
        _check_reference(annotation, "image_id", image_ids, where)
        _check_reference(annotation, "category_id", category_ids, where)
        box = _finite_box(annotation, where)
        defaults = {"iscrowd": 0, "area": box[2] * box[3]}
        annotations.append({**defaults, **annotation, "bbox": box, "id": index + 1})
    return {
        "info": {},
        "images": [dict(image) for image in gt["images"]],
        "categories": [dict(category) for category in gt["categories"]],
        "annotations": annotations,
    }


def _results_copy(preds: Sequence[Mapping[str, Any]], dataset: CocoDict, iou_type: str) -> CocoResults:
    """Checked copies of the results; without boxes, polygons become run-length masks as `loadRes` expects."""
    sizes = {image["id"]: (image.get("height"), image.get("width")) for image in dataset["images"]}
    category_ids = {category["id"] for category in dataset["categories"]}
    every_box = all("bbox" in pred for pred in preds)
    results = []
    for index, pred in enumerate(preds):
        where = f"preds[{index}]"
        _check_reference(pred, "image_id", sizes, where)
        _check_reference(pred, "category_id", category_ids, where)
        copy = {**pred, "score": _finite_score(pred.get("score"), where)}
        if iou_type == "bbox" or every_box:
            copy["bbox"] = _finite_box(pred, where)
        elif "segmentation" not in pred:
            raise RecordError(
                f"{where} has no segmentation: expected one in every result, or a bbox in every result"
            )
        else:
            copy.pop("bbox", None)
            copy["segmentation"] = _run_length_mask(pred["segmentation"], *sizes[pred["image_id"]])
        results.append(copy)
    return results


def _unique_ids(entries: Sequence[Mapping[str, Any]], what: str) -> set[int]:
    ids: set[int] = set()
    for index, entry in enumerate(entries):
        if entry["id"] in ids:
            raise RecordError(f"gt {what}[{index}] repeats id {entry['id']}: ids must be unique")
        ids.add(entry["id"])
    return ids


def _check_reference(entry: Mapping[str, Any], key: str, known: Any, where: str) -> None:
    if key not in entry:
        raise RecordError(f"{where} has no {key}")
    if entry[key] not in known:
        kind = "images" if key == "image_id" else "categories"
        raise RecordError(
            f"{where}.{key} is {entry[key]!r}, not one of the {len(known)} {kind} of the ground truth: "
            "are these results of another data set?"
        )


def _finite_score(score: float | None, where: str) -> float:
    if score is None:
        raise RecordError(
            f"{where} has no score: COCO evaluation needs scored detections (`coordexp score` adds them)"
        )
    if not math.isfinite(score):
        raise RecordError(f"{where}.score is {score}: expected a finite number")
    return float(score)


def _finite_box(entry: Mapping[str, Any], where: str) -> list[float]:
    box = entry.get("bbox")
    if (
        box is None
        or len(box) != 4
        or not all(math.isfinite(value) for value in box)
        or min(box[2], box[3]) < 0
    ):
        raise RecordError(
            f"{where}.bbox is {box!r}: expected 4 finite pixel values (x, y, width >= 0, height >= 0)"
        )
    return [float(value) for value in box]


def _run_length_mask(segmentation: Any, height: int, width: int) -> Any:
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    return segmentation
