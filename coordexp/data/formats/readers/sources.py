"""Recognising what a file or folder is, and reading it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from coordexp.data.check.source import Source
from coordexp.data.formats.convert import Extras
from coordexp.data.formats.options import ImportOptions
from coordexp.data.formats.readers.builder import Faults
from coordexp.data.formats.readers.coco import read_coco
from coordexp.data.formats.readers.cvat import read_cvat
from coordexp.data.formats.readers.jsonl import read_data_file
from coordexp.data.formats.readers.labelme import is_labelme, read_labelme
from coordexp.data.formats.readers.lvis import lvis_extras, read_lvis
from coordexp.data.formats.readers.voc import read_voc
from coordexp.data.formats.readers.xml_input import read_xml
from coordexp.data.formats.readers.yolo import find_config, read_yolo
from coordexp.errors import RecordError
from coordexp.eval.coco.annotations import PARTS
from coordexp.eval.coco.external import load_json

FORMATS = ("jsonl", "coco", "lvis", "yolo", "voc", "labelme", "cvat")

_COCO_PLACES = ("*.json", "annotations/*.json", "*/_annotations.coco.json", "*/annotations.json")


def read_sources(
    path: Path, options: ImportOptions, *, format_name: str | None = None, faults: Faults | None = None
) -> list[Source]:
    """The data sets in a file or folder: one for every split.

    format_name: one of `FORMATS`, None to recognise it.  faults: None stops at the first entry that cannot be read.
    Raises RecordError for what is none of the formats, and naming the entry at fault.
    """
    faults = faults or Faults()
    format_name = format_name or recognised(path)
    readers: Mapping[str, Callable[[], Sequence[Source]]] = {
        "jsonl": lambda: [read_data_file(file, faults) for file in _files(path, ["*.jsonl"])],
        "coco": lambda: [read_coco(file, options) for file in _files(path, _COCO_PLACES)],
        "lvis": lambda: [read_lvis(file, options) for file in _files(path, _COCO_PLACES)],
        "yolo": lambda: read_yolo(path, options, faults),
        "voc": lambda: read_voc(path, options, faults),
        "labelme": lambda: read_labelme(path, options, faults),
        "cvat": lambda: read_cvat(path, options, faults),
    }
    return list(readers[format_name]())


def extras_of(source: Source) -> Extras:
    """What the format of a source adds to records."""
    return lvis_extras(source) if source.kind == "lvis" else Extras()


def recognised(path: Path) -> str:
    """Which of `FORMATS` a file or folder is; RecordError naming what was looked for."""
    if path.is_dir():
        return _recognised_folder(path)
    if not path.exists():
        raise RecordError(f"{path}: cannot be read (No such file or directory).")
    kind = _recognised_file(path)
    if kind is None:
        raise RecordError(
            f"{path}: is none of {', '.join(FORMATS)} as far as can be seen. Say which it is (--format), or give the "
            "file or folder that the tool exported"
        )
    return kind


def _recognised_file(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return "jsonl"
    if suffix in (".yaml", ".yml"):
        return "yolo"
    if suffix == ".xml":
        return {"annotation": "voc", "annotations": "cvat"}.get(read_xml(path).tag)
    return _recognised_json(load_json(path)) if suffix == ".json" else None


def _recognised_json(content: Any) -> str | None:
    if is_labelme(content):
        return "labelme"
    if not isinstance(content, Mapping) or not any(key in content for key in PARTS):
        return None
    images = content.get("images")
    return "lvis" if isinstance(images, list) and any(map(_is_of_lvis, images[:100])) else "coco"


def _is_of_lvis(image: Any) -> bool:
    return (
        isinstance(image, Mapping)
        and bool(image.get("coco_url"))
        and ("neg_category_ids" in image or not image.get("file_name"))
    )


def _recognised_folder(folder: Path) -> str:
    if find_config(folder) is not None or next(folder.glob("labels/**/*.txt"), None) is not None:
        return "yolo"
    if (folder / "annotations.xml").is_file():
        return "cvat"
    for pattern, kinds in (
        ("Annotations/**/*.xml", ("voc",)),
        ("*.jsonl", ("jsonl",)),
        ("**/*.xml", ("voc", "cvat")),
    ):
        for file in sorted(folder.glob(pattern))[:1]:
            if (kind := _recognised_file(file)) in kinds:
                return str(kind)
    for pattern in (*_COCO_PLACES, "**/*.json"):
        for file in sorted(folder.glob(pattern))[:20]:
            if (kind := _recognised_file(file)) is not None:
                return kind
    if any((folder / name).is_file() for name in ("classes.txt", "obj.names")):
        return "yolo"
    raise RecordError(
        f"{folder}: holds nothing that looks like one of {', '.join(FORMATS)}. Say which it is (--format), or give the "
        "file or folder that the tool exported"
    )


def _files(path: Path, patterns: Sequence[str]) -> list[Path]:
    """The file itself, or those of a folder by the first pattern that finds any."""
    if not path.is_dir():
        return [path]
    for pattern in patterns:
        found = sorted(path.glob(pattern))
        if found:
            return found
    raise RecordError(f"{path}: holds no {patterns[0]}")
