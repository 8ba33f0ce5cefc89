"""What LVIS says beside its objects: which classes each image was checked for, and how frequent classes are.

LVIS annotates every class in some images only. A class without object in an image counts there where it is listed as
absent (`neg_category_ids`), else predictions of it are left out; and where not every object of a class is annotated
(`not_exhaustive_category_ids`), predictions that match none are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from coordexp.errors import RecordError
from coordexp.eval.coco.annotations import Dataset
from coordexp.eval.coco.fields import Id, shown

NEGATIVE, NOT_EXHAUSTIVE = "neg_category_ids", "not_exhaustive_category_ids"
FREQUENCY = "frequency"
FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}
"""By the number of training images that hold the class: below 10, below 100, and above."""

LVIS_MAX_DETS = 300
"""Detections of an image that count, of all classes together."""


@dataclass(frozen=True)
class Federation:
    """What is known of N images and K categories.

    negative, not_exhaustive: for every image, rows of the categories.  frequencies: "r", "c" or "f" for every category.
    """

    negative: list[list[int]]
    not_exhaustive: list[list[int]]
    frequencies: list[str]


def is_federated(dataset: Dataset) -> bool:
    """Whether every image says what it was checked for and every annotated category how frequent it is."""
    return (
        bool(dataset.images)
        and all(image.get(key) is not None for image in dataset.images for key in (NEGATIVE, NOT_EXHAUSTIVE))
        and all(dataset.categories[row].get(FREQUENCY) is not None for row in _annotated(dataset))
    )


def read_federation(dataset: Dataset) -> Federation:
    """What an LVIS data set says of its images and categories.

    A category without annotation needs no frequency: it counts nowhere.
    Raises RecordError naming the image or category that lacks it, or says something else than was expected.
    """
    rows = {category_id: row for row, category_id in enumerate(dataset.category_ids)}
    negative, not_exhaustive = (
        [category_rows(dataset, image, key, rows) for image in range(len(dataset.images))]
        for key in (NEGATIVE, NOT_EXHAUSTIVE)
    )
    annotated = set(_annotated(dataset))
    frequencies = []
    for row, category in enumerate(dataset.categories):
        found = category.get(FREQUENCY)
        if found is None and row not in annotated:
            found = "f"
        if not isinstance(found, str) or found not in FREQUENCIES:
            raise RecordError(
                f"{dataset.prefix}categories[{row}].{FREQUENCY} ({dataset.category_names[row]}) is {shown(found)}: "
                "LVIS evaluation needs one of r, c, f (rare, common, frequent)"
            )
        frequencies.append(found)
    return Federation(negative, not_exhaustive, frequencies)


def category_rows(dataset: Dataset, image: int, key: str, rows: Mapping[Id, int]) -> list[int]:
    """The rows of the categories that an image lists under a key.

    rows: of the category ids.  Raises RecordError for an image without the list, and for what is no known id.
    """
    where = f"{dataset.prefix}images[{image}].{key}"
    listed: Any = dataset.images[image].get(key)
    if listed is None:
        raise RecordError(
            f"{dataset.prefix}images[{image}] (id {shown(dataset.image_ids[image])}) has no {key}, which LVIS "
            "evaluation needs in every image: is this an LVIS file? Without --lvis it is evaluated as COCO"
        )
    if not isinstance(listed, (list, tuple)):
        raise RecordError(f"{where} is {shown(listed)}: expected a list of category ids")
    for category_id in listed:
        if (
            isinstance(category_id, bool)
            or not isinstance(category_id, (int, str))
            or category_id not in rows
        ):
            raise RecordError(f"{where} names category id {shown(category_id)}, which is not there")
    return [rows[category_id] for category_id in listed]


def _annotated(dataset: Dataset) -> list[int]:
    """Rows of the categories that have annotations."""
    found: list[int] = np.unique(dataset.category_M).tolist()
    return found
