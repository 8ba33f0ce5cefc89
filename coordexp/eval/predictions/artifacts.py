"""The files between a checkpoint and its scores.

`gt_vs_pred.jsonl`          one line per image: ground truth and parsed predictions in pixels
`pred_token_trace.jsonl`    beside it, one line per image: generated tokens and their log-probabilities
`infer_run.json`            what these two were made with: model, data, decoding
`coord_distributions.jsonl` what coordinates were read from, where the trace does not say (coordexp.eval.predictions.
                            distributions)
`gt_vs_pred_scored.jsonl`   the first file with a score per prediction (coordexp.eval.predictions.confidence)

A box is xyxy in pixels of the image the record names; bins become pixels by the inverse of the data contract's rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coordexp.codec.parse import ParsedRollout
from coordexp.codec.records import Record
from coordexp.errors import RecordError
from coordexp.eval.predictions.checked_classes import kept_metadata
from coordexp.eval.predictions.image_result import objects_of
from coordexp.files import read_jsonl

GT_VS_PRED = "gt_vs_pred.jsonl"
TOKEN_TRACE = "pred_token_trace.jsonl"
SCORED = "gt_vs_pred_scored.jsonl"
RUN_META = "infer_run.json"
DISTRIBUTIONS = "coord_distributions.jsonl"
COORD_MODE = "pixel"
ANSWER_FORM = "answer_form"
"""Names the form of a traced answer (`codec.forms.choose`), where that is not CoordJSON."""
TRUNCATED, INVALID_ROLLOUT, BAD_PICTURE = "truncated", "invalid_rollout", "bad_picture"
"""Entries of a line's `errors` that count answers, not objects. With the last nothing was asked."""


def answer_errors(parsed: ParsedRollout) -> dict[str, int]:
    """What the parser dropped, by reason, and what is wrong with the answer as a whole."""
    errors = {str(reason): count for reason, count in sorted(parsed.dropped_by_reason.items()) if count}
    if parsed.invalid_rollout:
        errors[INVALID_ROLLOUT] = 1
    if parsed.truncated:
        errors[TRUNCATED] = 1
    return errors


def artifact_line(
    record: Record, image_id: int, parsed: ParsedRollout, strict_json: str | None
) -> dict[str, Any]:
    """One line of `gt_vs_pred.jsonl`.

    parsed: the model's answer.  strict_json: it as strict JSON, None when it is not
    a complete container.
    """
    pred = objects_of(parsed.objects, record.width, record.height).rows(scored=False)
    return _line(record, image_id, pred, answer_errors(parsed)) | {"raw_output_json": strict_json}


def bad_picture_line(record: Record, image_id: int, fault: str) -> dict[str, Any]:
    """The line of a record that could not be asked about.  fault: why."""
    return _line(record, image_id, [], {BAD_PICTURE: 1}) | {"raw_output_json": None, "bad_picture": fault}


def _line(
    record: Record, image_id: int, pred: list[dict[str, Any]], errors: dict[str, int]
) -> dict[str, Any]:
    metadata = kept_metadata(record.metadata)
    return {
        "image_id": image_id,
        "image": record.images[0],
        "width": record.width,
        "height": record.height,
        "coord_mode": COORD_MODE,
        "gt": objects_of(record.objects, record.width, record.height).rows(scored=False),
        "pred": pred,
        "errors": errors,
        **({"metadata": metadata} if metadata else {}),
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
