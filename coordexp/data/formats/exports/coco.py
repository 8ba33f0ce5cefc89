"""The package's JSONL to a COCO annotation file: bins to pixels, descriptions to categories."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from coordexp.codec.records import Record, read_jsonl
from coordexp.data.check.source import Source
from coordexp.data.formats.readers.lvis import own_synonyms
from coordexp.errors import RecordError
from coordexp.eval.coco.annotations import CocoDict, plain_categories, read_categories
from coordexp.eval.coco.external import load_json
from coordexp.eval.coco.federation import NEGATIVE, NOT_EXHAUSTIVE
from coordexp.eval.coco.fields import Id
from coordexp.eval.coco.from_images import coco_of
from coordexp.eval.predictions.checked_classes import CheckedClasses
from coordexp.eval.predictions.image_result import ImageResult, Objects, objects_of
from coordexp.files import write_json


def export_coco(data: Path, output: Path, *, categories: Path | None = None) -> Counter[str]:
    """Write the records of `data` as a COCO annotation file; completely or not at all. Returns what was counted.

    Image ids and file names are those that `from-coco` kept in `metadata`; without them ids count from 1.
    Polygons and boxes get an outline (boxes as quadrilaterals).  categories: a COCO or LVIS file whose category ids
    to use; None numbers the descriptions by name.
    Raises RecordError naming file and line, also for a description that `categories` does not know.
    """
    records = read_jsonl(data)
    ids = _image_ids(records)
    images = [
        ImageResult(
            image_id=image_id,
            file_name=str((record.metadata or {}).get("file_name", record.images[0])),
            width=record.width,
            height=record.height,
            gt=objects_of(record.objects, record.width, record.height),
            pred=Objects.of([], []),
            checked=CheckedClasses.read(record.metadata, f"{record.file}:{record.line}: metadata"),
        )
        for image_id, record in zip(ids, records, strict=True)
    ]
    dataset = coco_of(images)[0].as_coco(segmentations=True)
    if categories is not None:
        _use_categories(dataset, categories, data)
    write_json(output, dataset, indent=None)
    return Counter(
        images_written=len(dataset["images"]),
        objects_written=len(dataset["annotations"]),
        categories_written=len(dataset["categories"]),
    )


def export_source(source: Source, output: Path) -> Counter[str]:
    """Write annotations of any format as a COCO annotation file; completely or not at all. Returns what was counted."""
    dataset = source.dataset.as_coco(segmentations=True)
    write_json(output, dataset, indent=None)
    return Counter(
        images_written=len(dataset["images"]),
        objects_written=len(dataset["annotations"]),
        categories_written=len(dataset["categories"]),
    )


def _image_ids(records: list[Record]) -> Sequence[Id]:
    """The ids that an import kept, where every record has one of its own; else from 1."""
    kept = [(record.metadata or {}).get("image_id") for record in records]
    ids = [
        image_id for image_id in kept if isinstance(image_id, (int, str)) and not isinstance(image_id, bool)
    ]
    return ids if len(set(ids)) == len(records) else range(1, len(records) + 1)


def _use_categories(dataset: CocoDict, categories: Path, data: Path) -> None:
    """Give the annotations the category ids of another file, found by name, readable name or synonym."""
    source = load_json(categories)
    if not isinstance(source, dict) or "categories" not in source:
        raise RecordError(f"{categories}: has no categories; expected a COCO or LVIS annotation file.")
    ids, names, entries = read_categories(source["categories"], prefix=f"{categories}: ")
    forms = own_synonyms(names, entries, f"{categories}: categories")
    id_of = {form: category_id for category_id, own in zip(ids, forms, strict=True) for form in own}
    id_of |= dict(zip(names, ids, strict=True))
    written = {category["id"]: category["name"] for category in dataset["categories"]}
    unknown = sorted(name for name in written.values() if name not in id_of)
    if unknown:
        raise RecordError(
            f"{data}: description {unknown[0]!r} (of {len(unknown)} such) is no category of {categories}. "
            "Give the file the data was made from, or leave out --categories."
        )
    for annotation in dataset["annotations"]:
        annotation["category_id"] = id_of[written[annotation["category_id"]]]
    for image in dataset["images"]:
        for key in {NEGATIVE, NOT_EXHAUSTIVE} & image.keys():
            image[key] = [id_of[written[category_id]] for category_id in image[key]]
    dataset["categories"] = plain_categories(ids, names, entries)
