"""Pascal VOC: an XML file for every picture, corners in whole pixels that count from 1.

    Annotations/a.xml    JPEGImages/a.jpg    ImageSets/Main/train.txt (the names of a split)

`xmin` and `ymin` count from 1 and `xmax`, `ymax` name the last pixel that belongs to the object, so that the box is
[xmin - 1, xmax]. A data set in which a 0 stands was written by a tool that counts from 0; it is read that way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element

from coordexp.data.check.findings import Finding, Level
from coordexp.data.check.source import Source
from coordexp.data.formats.options import ImportOptions
from coordexp.data.formats.paths import PICTURE_SUFFIXES, picture_path
from coordexp.data.formats.readers.builder import DatasetBuilder, Faults
from coordexp.data.formats.readers.xml_input import number_of, read_xml, size_of, text_of
from coordexp.data.formats.readers.yolo import SPLITS, read_lines
from coordexp.errors import RecordError
from coordexp.files import is_file

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
PICTURE_FOLDERS = ("JPEGImages", "images", "Images", "")


@dataclass(frozen=True)
class _Object:
    """An object as its file has it, before it is known what the file counts from."""

    name: str
    corners: list[float]
    number: int
    outlines: list[list[float]]


@dataclass(frozen=True)
class _Image:
    file: Path
    name: str
    picture: Path
    width: int
    height: int
    objects: list[_Object]


def read_voc(path: Path, options: ImportOptions, faults: Faults) -> list[Source]:
    """The splits of a Pascal VOC folder (one without a name where it has no ImageSets), or one XML file.

    Raises RecordError naming file and object (or hands it to `faults`).
    """
    folder = path.parent if path.is_file() else path
    files = annotation_files(path)
    if not files:
        raise RecordError(f"{path}: holds no XML file, expected Annotations/*.xml")
    images = [image for file in files for image in _read_file(file, folder, options, faults)]
    zero_based = any(min(obj.corners[:2]) < 1 for image in images for obj in image.objects)
    by_stem = {image.file.stem: image for image in images}
    splits = _splits(folder, by_stem) or {"": images}
    return [
        _source(path, split, chosen, folder, zero_based, faults)
        for split, chosen in splits.items()
        if chosen and options.split in (None, split)
    ]


def annotation_files(path: Path) -> list[Path]:
    """The XML files of a VOC folder (of its Annotations where there are any), or the one that is given."""
    if path.is_file():
        return [path]
    return sorted(path.glob("Annotations/**/*.xml")) or sorted(path.rglob("*.xml"))


def _source(
    path: Path, split: str, images: Sequence[_Image], folder: Path, zero_based: bool, faults: Faults
) -> Source:
    builder = DatasetBuilder()
    for image in images:
        file = Path(os.path.relpath(image.file, folder)).as_posix()
        row = builder.add_image(image.name, image.width, image.height, file=file)
        shift = 0.0 if zero_based else 1.0
        for obj in image.objects:
            x1, y1, x2, y2 = obj.corners
            outlines = [[value - shift for value in outline] for outline in obj.outlines]
            try:
                box = (x1 - shift, y1 - shift, x2, y2)
                builder.add_object(row, obj.name, box, obj.number, outlines=outlines or None)
            except RecordError as error:
                faults.add(str(error))
    note = Finding(
        Level.NOTE,
        "voc_counts_from_0",
        "a box begins at pixel 0, so corners are taken to count from 0, not from 1",
    )
    return Source(
        path, "voc", builder.build(), [image.picture for image in images], split,
        faults=faults.messages, findings=(note,) if zero_based else (),
    )  # fmt: skip


def _read_file(file: Path, folder: Path, options: ImportOptions, faults: Faults) -> Iterator[_Image]:
    try:
        root = read_xml(file)
        if root.tag != "annotation":
            raise RecordError(f"{file}: has the root <{root.tag}>, expected <annotation> (Pascal VOC)")
        name = text_of(root, "filename") or file.stem
        width, height = (
            size_of(root.findtext(f"size/{side}"), f"{file}: {side}") for side in ("width", "height")
        )
        picture = _picture(file, name, folder, options)
        objects = list(_objects(root, file, faults))
    except RecordError as error:
        faults.add(str(error))
        return
    yield _Image(file, name, picture, width, height, objects)


def _objects(root: Element, file: Path, faults: Faults) -> Iterator[_Object]:
    for number, element in enumerate(root.iter("object"), start=1):
        where = f"{file}: object {number}"
        try:
            box = element.find("bndbox")
            outlines = [_outline(polygon, where) for polygon in element.findall("polygon")]
            if box is not None:
                corners = [number_of(box.findtext(key), f"{where}.{key}") for key in _CORNERS]
            elif outlines:
                x, y = ([v for outline in outlines for v in outline[axis::2]] for axis in (0, 1))
                corners = [min(x), min(y), max(x), max(y)]
            else:
                raise RecordError(f"{where} has no bndbox: expected {', '.join(_CORNERS)}")
            yield _Object(text_of(element, "name"), corners, number, outlines)
        except RecordError as error:
            faults.add(str(error))


def _outline(polygon: Element, where: str) -> list[float]:
    """x1, y1, x2, y2, ... of elements of these names."""
    values: list[float] = []
    while (x := polygon.findtext(f"x{len(values) // 2 + 1}")) is not None:
        number = len(values) // 2 + 1
        y = polygon.findtext(f"y{number}")
        values += [number_of(x, f"{where}.polygon.x{number}"), number_of(y, f"{where}.polygon.y{number}")]
    if len(values) < 6:
        raise RecordError(f"{where} has a polygon of {len(values) // 2} points: expected at least 3")
    return values


def _picture(file: Path, name: str, folder: Path, options: ImportOptions) -> Path:
    """The picture of an annotation file: its `filename`, with any known suffix, in one of the usual folders."""
    if options.image_root is not None:
        places = [options.image_root]
    else:
        places = [folder / place for place in PICTURE_FOLDERS] + [file.parent]
        if folder == file.parent:  # one file was given, or a folder of XML files alone
            places += [folder.parent / place for place in PICTURE_FOLDERS if place]
    where = f"{file}: filename"
    candidates = [picture_path(place, name, where, allow_outside=options.allow_outside) for place in places]
    candidates += [place / f"{file.stem}{suffix}" for place in places for suffix in PICTURE_SUFFIXES]
    return next((path for path in candidates if is_file(path)), candidates[0])


def _splits(folder: Path, by_stem: dict[str, _Image]) -> dict[str, list[_Image]]:
    splits = {}
    for split in SPLITS:
        listing = folder / "ImageSets" / "Main" / f"{split}.txt"
        if is_file(listing):
            stems = [line.strip() for line in read_lines(listing)]
            splits[split] = [by_stem[stem] for stem in stems if stem in by_stem]
    return splits
