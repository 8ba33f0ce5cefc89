"""The files between a checkpoint and its scores.

`gt_vs_pred.jsonl`          one line per image: ground truth and parsed predictions in pixels
`pred_token_trace.jsonl`    beside it, one line per image: generated tokens and their log-probabilities
`infer_run.json`            what these two were made with: model, data, decoding
`gt_vs_pred_scored.jsonl`   the first file with a score per prediction (coordexp.eval.predictions.confidence)

A box is xyxy in pixels of the image the record names; bins become pixels by the inverse of the data contract's rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from coordexp.codec.records import Record
from coordexp.codec.schema import BoxObject
from coordexp.errors import RecordError
from coordexp.files import read_jsonl
from coordexp.geometry import dequantize_points

GT_VS_PRED = "gt_vs_pred.jsonl"
TOKEN_TRACE = "pred_token_trace.jsonl"
SCORED = "gt_vs_pred_scored.jsonl"
RUN_META = "infer_run.json"
COORD_MODE = "pixel"


def to_pixels(obj: BoxObject, width: int, height: int) -> list[float]:
    """Flat pixel coordinates x, y, x, y, ... of an object's bins."""
    points = dequantize_points([obj.bins[i : i + 2] for i in range(0, len(obj.bins), 2)], width, height)
    return [float(value) for value in points.reshape(-1)]


def pixel_objects(objects: Iterable[BoxObject], width: int, height: int) -> list[dict[str, Any]]:
    """Objects as the artefact stores them: type, points (pixels), desc."""
    return [{"type": obj.kind, "points": to_pixels(obj, width, height), "desc": obj.desc} for obj in objects]


def artifact_line(record: Record, image_id: int, parsed: Any, strict_json: str | None) -> dict[str, Any]:
    """One line of `gt_vs_pred.jsonl`.

    parsed: a `ParsedRollout` of the model's answer.  strict_json: the answer as strict JSON, None when it is not
    a complete container.
    """
    errors = {str(reason): count for reason, count in sorted(parsed.dropped_by_reason.items()) if count}
    if parsed.invalid_rollout:
        errors["invalid_rollout"] = 1
    if parsed.truncated:
        errors["truncated"] = 1
    return {
        "image_id": image_id,
        "image": record.images[0],
        "width": record.width,
        "height": record.height,
        "coord_mode": COORD_MODE,
        "gt": pixel_objects(record.objects, record.width, record.height),
        "pred": pixel_objects(parsed.objects, record.width, record.height),
        "errors": errors,
        "raw_output_json": strict_json,
    }


def read_jsonl_lines(path: Path, required: Sequence[str]) -> list[dict[str, Any]]:
    """Lines of an artefact, each holding the `required` keys; RecordError naming file and line otherwise."""
    lines = []
    for number, line in read_jsonl(path, allow_nan=True):
        missing = [key for key in required if not isinstance(line, dict) or key not in line]
        if missing:
            raise RecordError(
                f"{path}:{number}: lacks {', '.join(missing)}; is this a file of `coordexp infer`?"
            )
        lines.append(line)
    return lines


def check_pixels(line: dict[str, Any], where: str) -> None:
    """RecordError unless a line says that its boxes are in pixels: they are never scaled twice, or not at all."""
    if line["coord_mode"] != COORD_MODE:
        raise RecordError(
            f"{where}: coord_mode is {line['coord_mode']!r}, expected {COORD_MODE!r}; make the file with "
            "`coordexp infer`, or convert its boxes to pixels."
        )
