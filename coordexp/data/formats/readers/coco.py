"""COCO annotation files (instances)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from coordexp.data.check.pictures import OnPicture, no_progress
from coordexp.data.check.source import Source
from coordexp.data.formats.convert import Converted, convert
from coordexp.data.formats.options import ImportOptions
from coordexp.data.formats.paths import guessed_root, picture_paths
from coordexp.errors import RecordError
from coordexp.eval.coco.annotations import Dataset
from coordexp.eval.coco.external import load_dataset


def read_coco(annotations: Path, options: ImportOptions) -> Source:
    """A COCO annotation file, with its pictures under `options.image_root` where that is given.

    Raises RecordError naming file and entry for what cannot be read as COCO, for an image without file name, and for
    a name that leads out of the folder.
    """
    dataset = load_dataset(annotations)
    for row, name in enumerate(dataset.file_names):
        if not name:
            raise RecordError(
                f"{annotations}: images[{row}] (id {dataset.image_ids[row]}) has no file_name (an LVIS file? "
                "`coordexp data from-lvis`)"
            )
    return with_pictures(annotations, "coco", dataset, options)


def import_coco(
    annotations: Path,
    output: Path,
    options: ImportOptions,
    *,
    on_picture: OnPicture = no_progress,
) -> Converted:
    """Convert a COCO annotation file; see `convert`."""
    return convert(read_coco(annotations, options), output, options, on_picture=on_picture)


def with_pictures(annotations: Path, kind: str, dataset: Dataset, options: ImportOptions) -> Source:
    """A source whose file names start from `options.image_root`, or from where its pictures are found; else unknown."""
    root = options.image_root
    if root is None and options.find_pictures:
        root = guessed_root(annotations, dataset.file_names)
    if root is None:
        return Source(annotations, kind, dataset, [None] * len(dataset.image_ids))

    def where(row: int) -> str:
        return f"{annotations}: images[{row}].file_name (id {dataset.image_ids[row]})"

    pictures = picture_paths(root, dataset.file_names, where, allow_outside=options.allow_outside)
    return Source(annotations, kind, dataset, pictures)


def with_names(dataset: Dataset, file_names: list[str], category_names: list[str]) -> Dataset:
    """The same with other names of images and categories."""
    return replace(dataset, file_names=file_names, category_names=category_names)
