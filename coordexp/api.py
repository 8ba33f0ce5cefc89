"""The Python API: what `import coordexp` offers by name. Everything else may move between releases.

import coordexp

with coordexp.Detector.from_pretrained("runs/NAME/checkpoint-100") as detector:
    found = detector("street.jpg")
records = coordexp.load_records("data/val.jsonl")
numbers = coordexp.evaluate(records, detections)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, cast

from coordexp.codec.coord_vocab import Tokenizer
from coordexp.codec.forms.choose import form_of
from coordexp.codec.parse import ParsedRollout
from coordexp.codec.records import Record, read_jsonl
from coordexp.codec.schema import BoxObject
from coordexp.errors import ContractError
from coordexp.eval.coco.annotations import CocoDict, CocoResults
from coordexp.eval.coco.evaluate import DEFAULT_ENGINE, evaluate_coco, run_coco
from coordexp.eval.coco.from_images import coco_of
from coordexp.eval.predictions.image_result import objects_of
from coordexp.inference.detections import Detections
from coordexp.inference.detector import Detector
from coordexp.matching import MatchResult
from coordexp.matching import match_objects as match

__all__ = [
    "BoxObject",
    "Detections",
    "Detector",
    "MatchResult",
    "ParsedRollout",
    "Record",
    "evaluate",
    "load_records",
    "match",
    "parse",
]


def load_records(path: str | os.PathLike[str], *, check_pictures: bool = False) -> list[Record]:
    """Read a data file in the package's JSONL.

    Args:
        path: The file: one image with its objects per line, coordinates in bins 0..999.
        check_pictures: Also look at every picture: it is there, and as large as its record says.

    Returns:
        The records in the order of the file.

    Raises:
        RecordError: A line breaks the contract; names file, line and object.
    """
    return read_jsonl(path, require_images=check_pictures)


def parse(
    answer: str | Iterable[int],
    tokenizer: Tokenizer,
    *,
    answer_form: str = "coordjson",
    field_order: str = "desc_first",
    allow_poly: bool = True,
) -> ParsedRollout:
    """Read a model's answer: strictly, without repair.

    Args:
        answer: Token ids, or text, which is tokenised first.
        tokenizer: Of the model.
        answer_form: `coordjson`, `coordjson_numbers`, `qwen` or `compact`.
        field_order: Of an object's keys, `desc_first` or `geometry_first`.
        allow_poly: Keep polygons; otherwise they are dropped as `poly_unsupported`.

    Returns:
        The objects, what was dropped and why, and the prefix that a training target could continue.

    Raises:
        ConfigError: Another form or field order, or a tokenizer without the coordinate tokens that the form needs.
    """
    ids = tokenizer.encode(answer, add_special_tokens=False) if isinstance(answer, str) else answer
    return form_of(answer_form, field_order).parse(ids, tokenizer, allow_poly=allow_poly)


def evaluate(
    gt: CocoDict | Sequence[Record],
    preds: CocoResults | Sequence[Detections],
    *,
    iou_type: str = "bbox",
    engine: str = DEFAULT_ENGINE,
) -> dict[str, float]:
    """The 12 COCO numbers.

    Args:
        gt: A COCO data set, or records.
        preds: COCO results, or the detections of the records' pictures in the same order.
        iou_type: "bbox" or "segm".
        engine: "hotcoco", "faster-coco-eval" or "pycocotools"; they give the same numbers.

    Returns:
        AP, AP50, AP75, AP_small, AP_medium, AP_large, AR1, AR10, AR100, AR_small, AR_medium, AR_large; -1 where there
        is no ground truth to measure on.

    Raises:
        RecordError: An entry that cannot be evaluated, by name.
        ContractError: Detections of other pictures than the records', or one kind of input with the other.
        ConfigError: An unknown `iou_type` or `engine`.
    """
    records = not isinstance(gt, dict)
    if records != (bool(preds) and all(isinstance(one, Detections) for one in preds)) and len(preds):
        raise ContractError("evaluate takes a COCO data set with COCO results, or records with Detections")
    if not records:
        return evaluate_coco(cast(CocoDict, gt), cast(CocoResults, preds), iou_type=iou_type, engine=engine)
    dataset, results = coco_of(_images(cast(Sequence[Record], gt), cast(Sequence[Detections], preds)))
    return run_coco(dataset, results, iou_type=iou_type, engine=engine).metrics


def _images(records: Sequence[Record], detections: Sequence[Detections]) -> list[Any]:
    if len(records) != len(detections):
        raise ContractError(
            f"evaluate got {len(records)} records and {len(detections)} detections: expected as many"
        )
    images = []
    for image_id, (record, found) in enumerate(zip(records, detections, strict=True)):
        if (record.width, record.height) != (found.width, found.height):
            raise ContractError(
                f"record {image_id} ({record.images[0]}) is of {record.width} x {record.height} pixels, its detections "
                f"({found.name}) of {found.width} x {found.height}: are they in the same order?"
            )
        images.append(
            found.to_image_result(image_id, objects_of(record.objects, record.width, record.height))
        )
    return images
