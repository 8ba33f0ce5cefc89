"""Images with their objects as a COCO data set with results."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from coordexp.errors import RecordError
from coordexp.eval.coco.annotations import Dataset, Results
from coordexp.eval.coco.federation import FREQUENCY, NEGATIVE, NOT_EXHAUSTIVE
from coordexp.eval.predictions.image_result import ImageResult, Objects
from coordexp.geometry import FloatArray, IntArray, box_polygon, xyxy_to_xywh


def coco_of(images: Sequence[ImageResult]) -> tuple[Dataset, Results]:
    """COCO data set and results; categories are the ground-truth descriptions, sorted, with ids from 1.

    A prediction whose description is no category is left out. Boxes become xywh with width = x2 - x1 and height =
    y2 - y1 (no +1). A polygon gets a `segmentation` and its surrounding box, so that the pair serves both iou types.
    Every image stays in, also one without ground truth. Where images say which classes were looked for (LVIS), those
    are categories too, and images and categories say it in LVIS's form.
    Raises RecordError for a repeated image id or a score that is not a finite number.
    """
    _check_unique([image.image_id for image in images])
    gts, preds = [image.gt for image in images], [image.pred for image in images]
    names = sorted(category_names(images))
    rows = {name: row for row, name in enumerate(names)}
    image_M, boxes_M4 = _image_rows(gts), _boxes(gts)
    dataset = Dataset(
        prefix="",
        image_ids=[image.image_id for image in images],
        file_names=[image.file_name for image in images],
        sizes_N2=np.array([(image.width, image.height) for image in images], dtype=np.int64).reshape(-1, 2),
        category_ids=list(range(1, len(names) + 1)),
        category_names=names,
        annotation_ids=list(range(1, len(image_M) + 1)),
        image_M=image_M,
        category_M=_category_rows(gts, rows),
        boxes_xywh_M4=xyxy_to_xywh(boxes_M4),
        area_M=np.concatenate([gt.areas_N for gt in gts] or [np.zeros(0)]),
        crowd_M=np.concatenate([gt.crowd_N for gt in gts] or [np.zeros(0, dtype=bool)]),
        segmentations=[
            [list(points) if len(points) != 4 else quad]
            for points, quad in zip(
                chain.from_iterable(gt.points for gt in gts), box_polygon(boxes_M4).tolist(), strict=True
            )
        ],
        images=[_lvis_image(image, rows) for image in images],
        categories=_lvis_categories(images, names),
    )
    return dataset, _results(preds, rows, dataset)


def category_names(images: Sequence[ImageResult]) -> set[str]:
    """Descriptions of the ground truth, and classes that were looked for."""
    checked = [image.checked.names for image in images if image.checked is not None]
    return set(chain.from_iterable(image.gt.descs for image in images)).union(*checked)


def _lvis_image(image: ImageResult, rows: dict[str, int]) -> dict[str, Any]:
    if image.checked is None:
        return {}
    return {
        NEGATIVE: [rows[name] + 1 for name in image.checked.absent],
        NOT_EXHAUSTIVE: [rows[name] + 1 for name in image.checked.not_exhaustive],
    }


def _lvis_categories(images: Sequence[ImageResult], names: Sequence[str]) -> list[dict[str, Any]]:
    frequencies: dict[str, str] = {}
    for image in images:
        frequencies |= image.checked.frequencies if image.checked is not None else {}
    return [{FREQUENCY: frequencies[name]} if name in frequencies else {} for name in names]


def _results(preds: Sequence[Objects], rows: dict[str, int], dataset: Dataset) -> Results:
    category_M = _category_rows(preds, rows)
    known = category_M >= 0
    image_M = _image_rows(preds)[known]
    score_M = np.concatenate([pred.scores_N for pred in preds] or [np.zeros(0)])
    infinite = np.flatnonzero(~np.isfinite(score_M))
    if len(infinite):
        image_row = _image_rows(preds)[infinite[0]]
        index = infinite[0] - sum(len(pred) for pred in preds[:image_row])
        raise RecordError(
            f"image {dataset.image_ids[image_row]} pred[{index}].score is {score_M[infinite[0]]}: expected a finite "
            "number"
        )
    points = list(chain.from_iterable(pred.points for pred in preds))
    return Results(
        prefix="",
        dataset=dataset,
        image_M=image_M,
        category_M=category_M[known],
        boxes_xywh_M4=xyxy_to_xywh(_boxes(preds)[known]),
        score_M=score_M[known],
        segmentations=[
            [list(points[row])] if len(points[row]) != 4 else None for row in np.flatnonzero(known).tolist()
        ],
        has_boxes=True,
    )


def _check_unique(image_ids: Sequence[object]) -> None:
    seen: set[object] = set()
    for image_id in image_ids:
        if image_id in seen:
            raise RecordError(f"the images repeat id {image_id}: ids must be unique")
        seen.add(image_id)


def _image_rows(sides: Sequence[Objects]) -> IntArray:
    return np.repeat(np.arange(len(sides)), [len(objects) for objects in sides])


def _category_rows(sides: Sequence[Objects], rows: dict[str, int]) -> IntArray:
    """Row of the category of every object, -1 without one."""
    return np.array([rows.get(desc, -1) for objects in sides for desc in objects.descs], dtype=np.int64)


def _boxes(sides: Sequence[Objects]) -> FloatArray:
    return np.concatenate([objects.boxes_N4 for objects in sides] or [np.zeros((0, 4))])
