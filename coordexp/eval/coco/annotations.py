"""A COCO data set and detections on it as typed columns: the one reading behind evaluation, import and report.

    dataset = read_dataset(json.loads(...))                # ids of any kind, boxes float64 [M, 4], areas, crowds
    results = read_results(json.loads(...), dataset)

Everything that a number could be wrong about is checked here, and an error names the entry, the key, what was found
and what was expected. Ids stay as the file has them; columns refer to rows (`image_M` is a row of `image_ids`), so
that nothing below ever sees an id. Segmentations are kept as they are and checked when they are looked at
(`coordexp.eval.coco.segmentation`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordexp.codec.schema import is_blank
from coordexp.errors import RecordError
from coordexp.eval.coco.fields import (
    EntryPlace,
    Id,
    all_objects,
    check_entries,
    check_keys,
    check_unique,
    column,
    first,
    id_order,
    is_writable,
    present,
    read_boxes,
    read_flags,
    read_ids,
    read_names,
    read_numbers,
    read_texts,
    rows_of,
    shown,
)
from coordexp.eval.coco.segmentation import outline_box
from coordexp.geometry import FloatArray, IntArray

CocoDict = dict[str, Any]
CocoResults = list[dict[str, Any]]
BoolArray = NDArray[np.bool_]

PARTS = ("images", "annotations", "categories")
MAX_SIDE = 1_000_000
"""Pixels of an image side; a picture of more is none that a model or a mask could take."""

_SHARED_KEYS = ("image_id", "category_id", "bbox", "segmentation")
"""Of annotations and results."""
_TYPED = ("id", "name", "width", "height", "file_name")
_WRAPPERS = ("annotations", "predictions", "results", "detections", "preds", "data")


@dataclass(frozen=True, eq=False)
class Dataset:
    """N images, K categories and M annotations of a COCO data set.

    image_ids, category_ids: as in the file.  file_names: "" where the file has none.  sizes_N2: width and height in
    pixels, 0 where the file has none.  image_M, category_M: rows of the image and the category of an annotation.
    boxes_xywh_M4: pixels.  area_M: of the file, else of the box.  segmentations: as in the file, None where absent.
    annotation_ids: as in the file, of any kind, for messages.  places: what messages call annotations where the
    format has no ids ("labels/a.txt:3").
    images, categories: the entries themselves, for keys that only some formats have.
    prefix: of every message about an entry, such as the file's name.
    """

    prefix: str
    image_ids: list[Id]
    file_names: list[str]
    sizes_N2: IntArray
    category_ids: list[Id]
    category_names: list[str]
    annotation_ids: list[Any]
    image_M: IntArray
    category_M: IntArray
    boxes_xywh_M4: FloatArray
    area_M: FloatArray
    crowd_M: BoolArray
    segmentations: Sequence[Any]
    images: Sequence[Mapping[str, Any]]
    categories: Sequence[Mapping[str, Any]]
    places: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.image_M)

    @cached_property
    def image_rank_N(self) -> IntArray:
        """The place of each image in the order of the ids, from 0: the order that COCO evaluation works in."""
        return _ranks(self.image_ids)

    @cached_property
    def category_rank_K(self) -> IntArray:
        """The place of each category in the order of the ids, from 0."""
        return _ranks(self.category_ids)

    def names_by_rank(self) -> list[str]:
        """Category names in the order of the ids."""
        return [self.category_names[row] for row in np.argsort(self.category_rank_K).tolist()]

    def entry(self, index: int) -> str:
        """An annotation as messages name it that say the file already."""
        if self.places is not None:
            return self.places[index]
        found = self.annotation_ids[index]
        return f"annotations[{index}]" + ("" if found is None else f" (id {shown(found)})")

    def place(self, index: int) -> str:
        """An annotation as messages name it."""
        return self.prefix + self.entry(index)

    def as_coco(self, *, segmentations: bool = False) -> CocoDict:
        """The data set in COCO's form, with the ids of the file and every value of the right type.

        segmentations: write them too (as they are in the file).
        """
        images = [
            {"id": image_id, "width": int(width) or None, "height": int(height) or None, "file_name": name}
            | _extras(image)
            for image_id, (width, height), name, image in zip(
                self.image_ids, self.sizes_N2.tolist(), self.file_names, self.images, strict=True
            )
        ]
        categories = plain_categories(self.category_ids, self.category_names, self.categories)
        annotations: CocoResults = [
            {
                "id": number,
                "image_id": self.image_ids[image],
                "category_id": self.category_ids[category],
                "bbox": box,
                "area": area,
                "iscrowd": int(crowd),
            }
            for number, image, category, box, area, crowd in zip(
                self._written_ids(),
                self.image_M.tolist(),
                self.category_M.tolist(),
                self.boxes_xywh_M4.tolist(),
                self.area_M.tolist(),
                self.crowd_M.tolist(),
                strict=True,
            )
        ]
        if segmentations:
            for annotation, segmentation in zip(annotations, self.segmentations, strict=True):
                if segmentation is not None:
                    annotation["segmentation"] = segmentation
        return {"images": images, "annotations": annotations, "categories": categories}

    def _written_ids(self) -> Sequence[Id]:
        """The annotation ids of the file where they are whole numbers that tell annotations apart, else from 1."""
        kept = self.annotation_ids
        if set(map(type, kept)) <= {int} and len(set(kept)) == len(kept):
            return kept
        return range(1, len(kept) + 1)


@dataclass(frozen=True, eq=False)
class Results:
    """M scored detections on a `Dataset`; columns as there.

    boxes_xywh_M4: pixels; where only a mask is given, the box around it.  has_boxes: whether the file gave boxes.
    """

    prefix: str
    dataset: Dataset
    image_M: IntArray
    category_M: IntArray
    boxes_xywh_M4: FloatArray
    score_M: FloatArray
    segmentations: Sequence[Any]
    has_boxes: bool

    def __len__(self) -> int:
        return len(self.image_M)

    def place(self, index: int) -> str:
        """A result as messages name it."""
        return f"{self.prefix}preds[{index}]"

    def as_coco(self, *, segmentations: bool = False) -> CocoResults:
        """The results in COCO's form, with the ids of the data set's file and every value of the right type."""
        image_ids, category_ids = self.dataset.image_ids, self.dataset.category_ids
        results: CocoResults = [
            {"image_id": image_ids[image], "category_id": category_ids[category], "bbox": box, "score": score}
            for image, category, box, score in zip(
                self.image_M.tolist(),
                self.category_M.tolist(),
                self.boxes_xywh_M4.tolist(),
                self.score_M.tolist(),
                strict=True,
            )
        ]
        if segmentations:
            for result, segmentation in zip(results, self.segmentations, strict=True):
                if segmentation is not None:
                    result["segmentation"] = segmentation
        return results


def read_dataset(value: Any, *, prefix: str = "") -> Dataset:
    """Check a COCO (or LVIS) data set and put it into columns.

    prefix: in front of every message, such as "instances.json: ".
    Raises RecordError naming the entry: parts that are missing, repeated ids, unknown images or categories, malformed
    boxes, areas, sizes and flags, categories without a name or with that of another.
    """
    if not isinstance(value, Mapping):
        raise RecordError(
            f"{prefix}is {_kind_of_top_level(value)}: expected a COCO data set, an object with {', '.join(PARTS)}"
        )
    missing = [key for key in PARTS if key not in value]
    if missing:
        raise RecordError(
            f"{prefix}has no {', '.join(missing)}: expected a COCO data set with {', '.join(PARTS)}"
        )
    image_place, place = (
        EntryPlace(prefix + key, check_entries(value[key], prefix + key)) for key in ("images", "annotations")
    )
    images, annotations = image_place.entries, place.entries
    check_keys(image_place, ("id", "width", "height", "file_name"))
    check_keys(place, (*_SHARED_KEYS, "area", "iscrowd"))
    category_ids, category_names, categories = read_categories(value["categories"], prefix=prefix)
    image_ids = read_ids(column(images, "id"), image_place, "id", what="the image's id")
    check_unique(image_ids, image_place)
    image_M = _references(annotations, "image_id", image_ids, place, "images")
    category_M = _references(annotations, "category_id", category_ids, place, "categories")
    sizes_N2 = _sizes(images, image_place)
    segmentations = present(column(annotations, "segmentation"))
    boxes = _boxes_or_around(column(annotations, "bbox"), segmentations, place, sizes_N2[image_M])
    area_M = read_numbers(
        column(annotations, "area"), place, "area", "an area in square pixels", low=0, high=math.inf
    )
    area_M = np.where(np.isnan(area_M), boxes[:, 2] * boxes[:, 3], area_M)
    infinite = first(~np.isfinite(area_M))
    if infinite is not None:
        place.fail(infinite, "area", annotations[infinite].get("area"), "an area in square pixels")
    return Dataset(
        prefix=prefix,
        image_ids=image_ids,
        file_names=read_texts(
            column(images, "file_name"), image_place, "file_name", "the name of a picture file"
        ),
        sizes_N2=sizes_N2,
        category_ids=category_ids,
        category_names=category_names,
        annotation_ids=column(annotations, "id"),
        image_M=image_M,
        category_M=category_M,
        boxes_xywh_M4=boxes,
        area_M=area_M,
        crowd_M=read_flags(column(annotations, "iscrowd"), place, "iscrowd"),
        segmentations=segmentations,
        images=images,
        categories=categories,
    )


def read_categories(
    value: Any, *, prefix: str = ""
) -> tuple[list[Id], list[str], Sequence[Mapping[str, Any]]]:
    """Ids, names and entries of the categories of a data set.

    Raises RecordError naming an entry whose id or name is missing, of the wrong kind or that of another.
    """
    entries = check_entries(value, f"{prefix}categories")
    place = EntryPlace(f"{prefix}categories", entries)
    ids = read_ids(column(entries, "id"), place, "id", what="the category's id")
    check_unique(ids, place)
    return ids, _category_names(entries, place), entries


def plain_categories(
    ids: Sequence[Id], names: Sequence[str], entries: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Categories in COCO's form: id, name, and what else is known of them."""
    return [
        {"id": category_id, "name": name} | _extras(entry)
        for category_id, name, entry in zip(ids, names, entries, strict=True)
    ]


def read_results(
    value: Any,
    dataset: Dataset,
    *,
    iou_type: str = "bbox",
    prefix: str = "",
    of: str = " of the ground truth",
) -> Results:
    """Check a COCO results list against its data set and put it into columns.

    iou_type: what is evaluated, for the message about a result without geometry.  prefix: as in `read_dataset`.
    of: the data set in messages.
    Raises RecordError naming the entry: results of unknown images or categories, without a finite score, or without
    the geometry; and saying what the value is where it is no list of results.
    """
    if not isinstance(value, (list, tuple)) or not all_objects(value):
        raise RecordError(
            f"{prefix}is {_kind_of_top_level(value)}: expected a list of results, each with image_id, category_id, "
            "bbox or segmentation, score."
        )
    place = EntryPlace(f"{prefix}preds", value)
    check_keys(place, (*_SHARED_KEYS, "score"))
    image_M = _references(value, "image_id", dataset.image_ids, place, f"images{of}")
    category_M = _references(value, "category_id", dataset.category_ids, place, f"categories{of}")
    scores = column(value, "score")
    score_M = read_numbers(scores, place, "score", "a finite number", low=-math.inf, high=math.inf)
    fault = first(~np.isfinite(score_M))
    if fault is not None and scores[fault] is None:
        raise RecordError(
            f"{place.entry(fault)} has no score{place.keys(fault)}: COCO evaluation needs scored detections (`coordexp "
            "score` adds them)"
        )
    if fault is not None:
        place.fail(fault, "score", scores[fault], "a finite number")
    segmentations = present(column(value, "segmentation"))
    boxes = column(value, "bbox")
    has_boxes = None not in present(boxes)
    sizes_M2 = dataset.sizes_N2[image_M]
    return Results(
        prefix=prefix,
        dataset=dataset,
        image_M=image_M,
        category_M=category_M,
        boxes_xywh_M4=_boxes_or_around(boxes, segmentations, place, sizes_M2, iou_type=iou_type),
        score_M=score_M,
        segmentations=segmentations,
        has_boxes=has_boxes,
    )


def _references(
    entries: Sequence[Mapping[str, Any]], key: str, known: Sequence[Id], place: EntryPlace, kind: str
) -> IntArray:
    ids = read_ids(column(entries, key), place, key, what=f"an id of {kind}")
    return rows_of(ids, known, place, key, kind)


def _sizes(images: Sequence[Mapping[str, Any]], place: EntryPlace) -> IntArray:
    sizes = []
    for key in ("width", "height"):
        values = column(images, key)
        found = read_numbers(values, place, key, "a whole number of pixels", low=0, high=MAX_SIDE)
        fault = first(~np.isnan(found) & ((found != np.floor(found)) | (found == 0)))
        if fault is not None:
            place.fail(fault, key, values[fault], "a whole number of pixels")
        sizes.append(np.where(np.isnan(found), 0, found).astype(np.int64))
    return np.stack(sizes, axis=1)


def _boxes_or_around(
    values: Sequence[Any],
    segmentations: Sequence[Any],
    place: EntryPlace,
    sizes_M2: IntArray,
    *,
    iou_type: str = "bbox",
) -> FloatArray:
    """Boxes of the file, or around the segmentation where the file has no box."""
    boxes = read_boxes(values, place)
    for index in np.flatnonzero(np.isnan(boxes[:, 0])).tolist():
        if segmentations[index] is None:
            if iou_type == "segm":
                place.lacks(index, "segmentation", "one in every result, or a bbox in every result")
            expected = "4 finite pixel values (x, y, width >= 0, height >= 0)"
            if values[index] is None:
                place.lacks(index, "bbox", expected)
            place.fail(index, "bbox", values[index], expected)
        width, height = sizes_M2[index].tolist()
        boxes[index] = outline_box(segmentations[index], width, height, place.entry(index, "segmentation"))
    return boxes


def _category_names(categories: Sequence[Mapping[str, Any]], place: EntryPlace) -> list[str]:
    names = read_names(column(categories, "name"), place, "name", "the name of a class")
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        if is_blank(name):
            place.lacks(index, "name", "the name of a class")
        if name in seen:
            raise RecordError(
                f"{place.name}[{index}] and [{seen[name]}] are both named {name!r}: names must be unique"
            )
        seen[name] = index
    return names


def _ranks(ids: Sequence[Id]) -> IntArray:
    order = sorted(range(len(ids)), key=lambda row: id_order(ids[row]))
    ranks = np.empty(len(ids), dtype=np.int64)
    ranks[order] = np.arange(len(ids))
    return ranks


def _extras(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Further keys of an entry whose values are text or whole numbers, or lists of them."""
    return {
        key: value
        for key, value in entry.items()
        if key not in _TYPED and is_writable(key) and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(is_writable(v) if isinstance(v, str) else type(v) is int for v in values)


def _kind_of_top_level(value: Any) -> str:
    """What a file holds that is not what was expected, as far as it can be recognised."""
    if isinstance(value, Mapping):
        if all(key in value for key in PARTS):
            return "a COCO data set (images, annotations, categories)"
        for key in _WRAPPERS:
            if isinstance(value.get(key), list):
                return f'an object that holds a list of {len(value[key])} entries as "{key}" (give that list alone)'
        if "image_id" in value:
            return "one result, not in a list"
        return f"an object with the keys {shown(list(value))}"
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], Mapping) and "image_id" in value[0]:
            return "a list of results"
        return f"a list that holds {shown(next((v for v in value if not isinstance(v, Mapping)), value))}"
    return shown(value)
