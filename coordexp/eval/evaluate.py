"""Scores of a scored prediction file: F1 at IoU thresholds, and COCO average precision."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from coordexp.errors import RecordError
from coordexp.eval.artifacts import SCORED, check_pixels, read_jsonl_lines, write_json
from coordexp.eval.coco import ImageDetections, evaluate_coco, to_coco
from coordexp.eval.detection import DetectionMetrics
from coordexp.geometry import polygon_box

_SCORED_KEYS = ("image_id", "image", "width", "height", "coord_mode", "gt", "pred", "pred_score_source")


def read_scored(path: Path) -> list[dict[str, Any]]:
    """Lines of a scored file. RecordError for unscored input (with the command that scores it) or a bad score."""
    lines = read_jsonl_lines(path, _SCORED_KEYS[:-1])
    seen: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        if "pred_score_source" not in line:
            raise RecordError(
                f"{path}:{number}: predictions carry no scores, and average precision is meaningless without them. "
                f"Run `coordexp score --run {path.parent}` and give its {SCORED}."
            )
        if line["image_id"] in seen:
            first = seen[line["image_id"]]
            raise RecordError(f"{path}:{number}: image_id {line['image_id']} stands in line {first} already.")
        seen[line["image_id"]] = number
        check_pixels(line, f"{path}:{number}")
        _check_objects(line, f"{path}:{number}")
        for index, obj in enumerate(line["pred"]):
            if not isinstance(obj.get("score"), (int, float)) or not math.isfinite(obj["score"]):
                raise RecordError(
                    f"{path}:{number}: pred[{index}] has score {obj.get('score')!r}; expected a finite number."
                )
    return lines


def evaluate_lines(lines: list[dict[str, Any]], *, engine: str = "pycocotools") -> dict[str, Any]:
    """Metrics of scored lines.

    f1_at_50, f1_50_95: micro F1 where a match needs equal desc and the IoU; 50_95 is the mean over 0.50:0.05:0.95.
    box_f1_*: the same without looking at the desc.  precision_at_50, recall_at_50: of f1_at_50.
    AP...: COCO numbers with the file's scores; `AP_const` with every score 1.0, which is what a model without
    confidences would get.
    """
    metrics, boxes_only = DetectionMetrics(), DetectionMetrics(class_aware=False)
    for line in lines:
        metrics.update(*_boxes(line["pred"]), *_boxes(line["gt"]))
        boxes_only.update(*_boxes(line["pred"]), *_boxes(line["gt"]))
    summary, box_summary = metrics.compute(), boxes_only.compute()
    half = summary.at(0.5)
    coco = to_coco(_detections(lines))
    const = to_coco(_detections(lines, constant_score=True))
    return {
        "num_images": len(lines),
        "num_gt": sum(len(line["gt"]) for line in lines),
        "num_pred": sum(len(line["pred"]) for line in lines),
        "f1_at_50": half.micro.f1,
        "precision_at_50": half.micro.precision,
        "recall_at_50": half.micro.recall,
        "f1_50_95": summary.mean_f1,
        "box_f1_at_50": box_summary.f1_at(0.5),
        "box_f1_50_95": box_summary.mean_f1,
        **evaluate_coco(coco.gt, coco.preds, engine=engine),
        "AP_const": evaluate_coco(const.gt, const.preds, engine=engine)["AP"],
        "dropped_unknown_desc": sum(coco.dropped.values()),
        "per_class_at_50": {desc: counts._asdict() for desc, counts in half.per_class.items()},
    }


def evaluate_directory(directory: Path, *, engine: str = "pycocotools") -> dict[str, Any]:
    """Evaluate a run's scored file; writes coco_gt.json, coco_preds.json and metrics.json beside it."""
    lines = read_scored(directory / SCORED)
    coco = to_coco(_detections(lines))
    write_json(directory / "coco_gt.json", coco.gt)
    write_json(directory / "coco_preds.json", coco.preds)
    metrics = evaluate_lines(lines, engine=engine)
    write_json(directory / "metrics.json", metrics)
    return metrics


def _check_objects(line: dict[str, Any], where: str) -> None:
    for side in ("gt", "pred"):
        for index, obj in enumerate(line[side]):
            missing = [key for key in ("desc", "points") if key not in obj]
            if missing:
                raise RecordError(f"{where}: {side}[{index}] lacks {', '.join(missing)}.")


def _boxes(objects: list[dict[str, Any]]) -> tuple[list[list[float]], list[str]]:
    boxes = [
        obj["points"] if len(obj["points"]) == 4 else polygon_box(obj["points"]).tolist() for obj in objects
    ]
    return boxes, [obj["desc"] for obj in objects]


def _detections(lines: list[dict[str, Any]], *, constant_score: bool = False) -> list[ImageDetections]:
    return [
        ImageDetections(
            image_id=line["image_id"],
            width=line["width"],
            height=line["height"],
            file_name=line["image"],
            gt=[(obj["desc"], obj["points"]) for obj in line["gt"]],
            pred=[
                (obj["desc"], obj["points"], 1.0 if constant_score else obj["score"]) for obj in line["pred"]
            ],
        )
        for line in lines
    ]
