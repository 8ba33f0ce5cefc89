"""What COCO engines are given: plain dicts with ids from 1 in the order of the file's ids, and masks already drawn.

Engines sort by ids, take annotation id 0 for "unmatched", and some read ids into 64-bit numbers: they get ids of our
own, whatever the file has. The order is kept, because equal scores are ranked in the order of the images.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from coordexp.errors import RecordError
from coordexp.eval.coco.annotations import CocoDict, CocoResults, Dataset, Results
from coordexp.eval.coco.federation import FREQUENCY, NEGATIVE, NOT_EXHAUSTIVE, Federation
from coordexp.eval.coco.fields import first
from coordexp.eval.coco.segmentation import to_mask
from coordexp.geometry import FloatArray, box_polygon, xywh_to_xyxy

MAX_MASK_BYTES = 1 << 30
"""All masks of a data set together, packed."""


def engine_dataset(
    dataset: Dataset, iou_type: str = "bbox", federation: Federation | None = None
) -> CocoDict:
    """The ground truth for an engine: images, categories and annotations with ids from 1.

    federation: what LVIS says of it, for evaluation as LVIS, which knows no crowd regions (they are objects).
    Raises RecordError for iou_type "segm" naming an image without size or an annotation whose segmentation is missing
    or broken.
    """
    image_ids, category_ids = dataset.image_rank_N + 1, dataset.category_rank_K + 1
    annotations: CocoResults = [
        {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "area": area,
            "iscrowd": int(crowd),
        }
        for number, image, category, box, area, crowd in zip(
            range(1, len(dataset) + 1),
            image_ids[dataset.image_M].tolist(),
            category_ids[dataset.category_M].tolist(),
            dataset.boxes_xywh_M4.tolist(),
            dataset.area_M.tolist(),
            (dataset.crowd_M if federation is None else np.zeros_like(dataset.crowd_M)).tolist(),
            strict=True,
        )
    ]
    if iou_type == "segm":
        _check_sizes(dataset)
        _add_masks(annotations, dataset, dataset)
    made: CocoDict = {
        "info": {},
        "images": [
            {"id": image_id, "width": width, "height": height}
            for image_id, (width, height) in zip(image_ids.tolist(), dataset.sizes_N2.tolist(), strict=True)
        ],
        "categories": [
            {"id": category_id, "name": name}
            for category_id, name in zip(category_ids.tolist(), dataset.category_names, strict=True)
        ],
        "annotations": annotations,
    }
    if federation is not None:
        ids = category_ids.tolist()
        lists = zip(made["images"], federation.negative, federation.not_exhaustive, strict=True)
        for image, negative, not_exhaustive in lists:
            image[NEGATIVE] = [ids[row] for row in negative]
            image[NOT_EXHAUSTIVE] = [ids[row] for row in not_exhaustive]
        for category, frequency in zip(made["categories"], federation.frequencies, strict=True):
            category[FREQUENCY] = frequency
    return made


def engine_results(results: Results, iou_type: str = "bbox") -> CocoResults:
    """The detections for an engine, on the ids of `engine_dataset`.

    For iou_type "segm" a result without segmentation covers its box; where any result has no box, none is given and
    engines take the areas of the masks, as `loadRes` does. Raises RecordError naming a broken segmentation.
    """
    dataset = results.dataset
    entries: CocoResults = [
        {"image_id": image, "category_id": category, "bbox": box, "score": score}
        for image, category, box, score in zip(
            (dataset.image_rank_N + 1)[results.image_M].tolist(),
            (dataset.category_rank_K + 1)[results.category_M].tolist(),
            results.boxes_xywh_M4.tolist(),
            results.score_M.tolist(),
            strict=True,
        )
    ]
    if iou_type == "segm":
        if not results.has_boxes:
            for entry in entries:
                del entry["bbox"]
        _add_masks(entries, results, dataset)
    return entries


def engine_columns(results: Results) -> FloatArray:
    """The same for boxes, as rows of image id, x, y, width, height, score, category id.  float64 [M, 7]"""
    dataset = results.dataset
    image_M = (dataset.image_rank_N + 1)[results.image_M]
    category_M = (dataset.category_rank_K + 1)[results.category_M]
    return np.column_stack([image_M, results.boxes_xywh_M4, results.score_M, category_M]).astype(np.float64)


def _check_sizes(dataset: Dataset) -> None:
    fault = first((dataset.sizes_N2 == 0).any(axis=1))
    if fault is not None:
        raise RecordError(
            f"{dataset.prefix}images[{fault}] (id {dataset.image_ids[fault]}) has no width and height, which segm "
            "needs to draw masks"
        )


def _add_masks(entries: CocoResults, source: Dataset | Results, dataset: Dataset) -> None:
    """Give every entry its mask; a result without segmentation gets that of its box."""
    quads = box_polygon(xywh_to_xyxy(source.boxes_xywh_M4)) if isinstance(source, Results) else None
    num_bytes = 0
    for index, (entry, (width, height)) in enumerate(
        zip(entries, dataset.sizes_N2[source.image_M].tolist(), strict=True)
    ):
        segmentation: Any = source.segmentations[index]
        where = f"{source.place(index)}.segmentation"
        if segmentation is None and quads is None:
            raise RecordError(
                f"{source.place(index)} has no segmentation, which segm needs in every annotation: evaluate boxes "
                "(bbox) instead, or add the outlines"
            )
        if segmentation is None and quads is not None:
            segmentation = [quads[index].tolist()]
        entry["segmentation"] = to_mask(segmentation, width, height, where)
        num_bytes += len(entry["segmentation"]["counts"])
        if num_bytes > MAX_MASK_BYTES:
            raise RecordError(
                f"{source.place(index)}: the masks up to here take more than {MAX_MASK_BYTES >> 30} GiB; evaluate "
                "boxes (bbox), or fewer images at a time"
            )
