"""LVIS v1 annotation files.

As COCO, with what LVIS adds: images are named by `coco_url`; category names are made readable (`bow_(weapon)` becomes
`bow (weapon)`) or replaced by one of their synonyms; and the categories known to be absent from an image, and those
not annotated exhaustively there, are kept in the record's metadata.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from coordexp.codec.descs import canonical_desc
from coordexp.data.check.pictures import OnPicture, no_progress
from coordexp.data.check.source import Source
from coordexp.data.formats.convert import Converted, Extras, convert
from coordexp.data.formats.options import ImportOptions
from coordexp.data.formats.readers.coco import with_names, with_pictures
from coordexp.errors import ConfigError, RecordError
from coordexp.eval.coco.annotations import Dataset
from coordexp.eval.coco.external import load_dataset
from coordexp.eval.coco.federation import FREQUENCIES, FREQUENCY, NEGATIVE, NOT_EXHAUSTIVE, category_rows
from coordexp.eval.coco.fields import EntryPlace, is_writable, read_texts, shown
from coordexp.eval.predictions import checked_classes

NAMINGS = ("name", "synonyms")


def read_lvis(annotations: Path, options: ImportOptions) -> Source:
    """An LVIS annotation file, names readable, with its pictures under `options.image_root` where that is given.

    Raises RecordError as `read_coco`, and for an image with neither `coco_url` nor `file_name`.
    """
    dataset = load_dataset(annotations)
    urls = read_texts(
        [image.get("coco_url") for image in dataset.images],
        EntryPlace(f"{annotations}: images", dataset.images),
        "coco_url",
        "the address of a picture",
    )
    names = []
    for row, (name, url) in enumerate(zip(dataset.file_names, urls, strict=True)):
        names.append(name or lvis_file_name(url))
        if not names[-1]:
            raise RecordError(
                f"{annotations}: images[{row}] (id {dataset.image_ids[row]}) has neither a coco_url nor a file_name"
            )
    readable = [readable_name(name) for name in dataset.category_names]
    return with_pictures(annotations, "lvis", with_names(dataset, names, readable), options)


def import_lvis(
    annotations: Path,
    output: Path,
    options: ImportOptions,
    *,
    name_by: str = "name",
    seed: int = 0,
    on_picture: OnPicture = no_progress,
) -> Converted:
    """Convert an LVIS v1 annotation file; see `convert`.

    name_by: "name" describes an object by its category's name, "synonyms" by one of `own_synonyms`, drawn for
    every annotation from `seed` and its id.
    """
    source = read_lvis(annotations, options)
    return convert(
        source, output, options, lvis_extras(source, name_by=name_by, seed=seed), on_picture=on_picture
    )


def lvis_extras(source: Source, *, name_by: str = "name", seed: int = 0) -> Extras:
    """What LVIS adds to records: descriptions by `name_by` (see `import_lvis`), and what is known of images."""
    if name_by not in NAMINGS:
        raise ConfigError(f"name_by is {name_by!r}: expected one of {', '.join(NAMINGS)}")
    dataset = source.dataset
    descs = _synonyms(dataset, source.path, seed) if name_by == "synonyms" else None
    counts = Counter[str]()
    for row, category in enumerate(dataset.categories):
        frequency = category.get(FREQUENCY)
        if isinstance(frequency, str) and frequency in FREQUENCIES:
            counts[f"annotations_{FREQUENCIES[frequency]}"] += int((dataset.category_M == row).sum())
    return Extras(descs, _image_metadata(dataset), counts)


def readable_name(name: str) -> str:
    """An LVIS name as people write it: underscores are spaces."""
    return " ".join(canonical_desc(name).replace("_", " ").split())


def own_synonyms(
    names: Sequence[str], categories: Sequence[Mapping[str, Any]], where: str = "categories"
) -> list[list[str]]:
    """For every category its readable name and synonyms, without those that another category has too.

    What is left names one category, so that a description can be led back to it. Never empty: a category's name stays.
    names: of the categories, whose entries may hold `synonyms`.
    Raises RecordError naming a category whose synonyms are no list of text.
    """
    all_forms = []
    for row, (name, category) in enumerate(zip(names, categories, strict=True)):
        synonyms = category.get("synonyms") or ()
        if not isinstance(synonyms, (list, tuple)) or not all(
            isinstance(text, str) and is_writable(text) for text in synonyms
        ):
            raise RecordError(f"{where}[{row}].synonyms is {shown(synonyms)}: expected a list of names")
        forms = [readable_name(text) for text in (name, *synonyms)]
        all_forms.append(list(dict.fromkeys(form for form in forms if form)))
    holders = Counter(form for own in all_forms for form in own)
    return [[form for form in own if form == own[0] or holders[form] == 1] for own in all_forms]


def lvis_file_name(url: str) -> str:
    """`val2017/000000397133.jpg` of a `coco_url` that ends so; "" of an address without a path."""
    try:
        return "/".join(urlsplit(url).path.strip("/").split("/")[-2:])
    except ValueError:  # no address at all
        return ""


def _synonyms(dataset: Dataset, annotations: Path, seed: int) -> list[str]:
    """For every annotation one of its category's own names."""
    choices = own_synonyms(dataset.category_names, dataset.categories, f"{annotations}: categories")
    return [
        random.Random(f"coordexp-lvis/{seed}/{annotation_id}").choice(choices[category])
        for annotation_id, category in zip(dataset.annotation_ids, dataset.category_M.tolist(), strict=True)
    ]


def _image_metadata(dataset: Dataset) -> Callable[[int], dict[str, Any]]:
    """What is known of an image, by the names of `coordexp.eval.predictions.checked_classes`."""
    rows = {category_id: row for row, category_id in enumerate(dataset.category_ids)}
    names = dataset.category_names
    found = ((row, category.get(FREQUENCY)) for row, category in enumerate(dataset.categories))
    frequencies = {row: value for row, value in found if isinstance(value, str) and value in FREQUENCIES}
    categories_of: list[set[int]] = [set() for _ in dataset.images]
    for image, category in zip(dataset.image_M.tolist(), dataset.category_M.tolist(), strict=True):
        categories_of[image].add(category)

    def metadata(image: int) -> dict[str, Any]:
        checked: dict[str, Any] = {
            written: [names[row] for row in category_rows(dataset, image, key, rows)]
            for key, written in (
                (NEGATIVE, checked_classes.ABSENT),
                (NOT_EXHAUSTIVE, checked_classes.NOT_EXHAUSTIVE),
            )
            if dataset.images[image].get(key) is not None
        }
        known = {names[row]: frequencies[row] for row in sorted(categories_of[image]) if row in frequencies}
        return checked | ({checked_classes.FREQUENCIES: known} if known else {})

    return metadata
