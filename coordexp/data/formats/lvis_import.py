"""LVIS v1 annotation files to the package's JSONL.

As `coco_import`, with what LVIS adds: images are named by `coco_url`; category names are made readable
(`bow_(weapon)` becomes `bow (weapon)`) or replaced by one of their synonyms; and the categories known to be absent from
an image, and those not annotated exhaustively there, are kept in the record's metadata.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from coordexp.data.formats.coco_import import ImportOptions, convert, read_annotations
from coordexp.errors import ConfigError, RecordError
from coordexp.eval.coco.external import naming
from coordexp.files import write_jsonl

NAMINGS = ("name", "synonyms")
FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}
NEGATIVE, NOT_EXHAUSTIVE = "neg_category_ids", "not_exhaustive_category_ids"


def import_lvis(
    annotations: Path, output: Path, options: ImportOptions, *, name_by: str = "name", seed: int = 0
) -> Counter[str]:
    """Convert an LVIS v1 annotation file; writes `output` completely or not at all and returns what was counted.

    name_by: "name" describes an object by its category's name, "synonyms" by one of `own_synonyms`, drawn for
    every annotation from `seed` and its id.  Raises as `import_coco`.
    """
    if name_by not in NAMINGS:
        raise ConfigError(f"name_by is {name_by!r}: expected one of {', '.join(NAMINGS)}")
    source = read_annotations(annotations)
    names = {category["id"]: readable_name(category["name"]) for category in source["categories"]}
    choices = own_synonyms(source["categories"])

    def describe(category: Mapping[str, Any], annotation_id: int) -> str:
        if name_by == "name":
            return names[category["id"]]
        return random.Random(f"coordexp-lvis/{seed}/{annotation_id}").choice(choices[category["id"]])

    def metadata(image: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key.removesuffix("_category_ids") + "_categories": [_name_of(names, k, image) for k in image[key]]
            for key in (NEGATIVE, NOT_EXHAUSTIVE)
            if key in image
        }

    with naming(annotations):
        lines, counts = convert(
            source, output.parent, options, describe=describe, file_name=lvis_file_name, metadata=metadata
        )
    write_jsonl(output, lines)
    frequency = {category["id"]: category.get("frequency") for category in source["categories"]}
    for annotation in source["annotations"]:
        if frequency[annotation["category_id"]] in FREQUENCIES:
            counts[f"annotations_{FREQUENCIES[frequency[annotation['category_id']]]}"] += 1
    return counts


def readable_name(name: str) -> str:
    """An LVIS name as people write it: underscores are spaces."""
    return " ".join(name.replace("_", " ").split())


def own_synonyms(categories: Sequence[Mapping[str, Any]]) -> dict[int, list[str]]:
    """Category id -> its readable name and synonyms, without those that another category has too.

    What is left names one category, so that a description can be led back to it. Never empty: a category's name stays.
    """
    forms = {
        category["id"]: list(
            dict.fromkeys(map(readable_name, [category["name"], *category.get("synonyms", ())]))
        )
        for category in categories
    }
    holders = Counter(form for own in forms.values() for form in own)
    return {
        category_id: [form for form in own if form == own[0] or holders[form] == 1]
        for category_id, own in forms.items()
    }


def lvis_file_name(image: Mapping[str, Any]) -> str:
    """`val2017/000000397133.jpg` of a `coco_url` that ends so; `file_name` where the file has one."""
    if image.get("file_name"):
        return str(image["file_name"])
    if not image.get("coco_url"):
        raise RecordError(f"image id {image['id']} has neither coco_url nor file_name")
    return "/".join(urlsplit(image["coco_url"]).path.strip("/").split("/")[-2:])


def _name_of(names: Mapping[int, str], category_id: int, image: Mapping[str, Any]) -> str:
    if category_id not in names:
        raise RecordError(f"image id {image['id']} names category id {category_id}, which is not there")
    return names[category_id]
