"""The numbers of `coordexp eval` for detections in memory, as training evaluates them.

metrics = map_of(images, iou_type="bbox")        # {"AP": ..., "AP50": ..., "AP_const": ..., "f1_at_50": ...}
"""

from __future__ import annotations

from collections.abc import Sequence

from coordexp.codec.schema import KIND_BBOX, KIND_POLY
from coordexp.eval.coco.evaluate import METRIC_NAMES, ImageDetections
from coordexp.eval.evaluate import Detections, EvalSettings, evaluate
from coordexp.eval.predictions.artifacts import COORD_MODE

NUMBERS = (
    *METRIC_NAMES,
    "AP_const",
    "f1_at_50",
    "f1_50_95",
    "precision_at_50",
    "recall_at_50",
    "box_f1_at_50",
    "box_f1_50_95",
)


def map_of(
    images: Sequence[ImageDetections], *, iou_type: str = "bbox", engine: str = "pycocotools"
) -> dict[str, float]:
    """AP, AR and F1 over `images`, under the names and by the code of `coordexp eval` (`NUMBERS`).

    images: all of the evaluation set (gathered from every rank), in pixels; a model without log-probabilities
    scores 1.0.  iou_type: "bbox" or "segm".  A number without ground truth to measure on is -1.
    Raises RecordError for a repeated image id or a score that is no finite number, ContractError without images.
    """
    settings = EvalSettings(iou_type=iou_type, engine=engine)
    metrics = evaluate(Detections("", [_line(image) for image in images]), settings).metrics
    return {name: metrics[name] for name in NUMBERS}


def _line(image: ImageDetections) -> dict[str, object]:
    return {
        "image_id": image.image_id,
        "image": image.file_name,
        "width": image.width,
        "height": image.height,
        "coord_mode": COORD_MODE,
        "gt": [_object(desc, points) for desc, points in image.gt],
        "pred": [{**_object(desc, points), "score": score} for desc, points, score in image.pred],
    }


def _object(desc: str, points: Sequence[float]) -> dict[str, object]:
    return {"type": KIND_BBOX if len(points) == 4 else KIND_POLY, "points": list(points), "desc": desc}
