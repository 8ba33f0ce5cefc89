"""CVAT for images 1.1: one XML file for all pictures, with boxes, polygons and masks in pixels.

Ellipses become outlines. Polylines, points, cuboids, skeletons and tags have no extent of their own: they are left out
and counted. Tracks of videos are refused: their frames are no files yet.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from math import cos, pi, radians, sin
from pathlib import Path
from xml.etree.ElementTree import Element

from coordexp.data.check.source import Source
from coordexp.data.formats.options import ImportOptions
from coordexp.data.formats.paths import picture_path
from coordexp.data.formats.readers.builder import DatasetBuilder, Faults
from coordexp.data.formats.readers.xml_input import number_of, read_xml, size_of
from coordexp.errors import RecordError
from coordexp.eval.coco.fields import shown
from coordexp.files import is_file

PICTURE_FOLDERS = ("images", "")
OBJECTS = ("box", "polygon", "mask", "ellipse")
_CORNERS = ("xtl", "ytl", "xbr", "ybr")
_ELLIPSE_POINTS = 36


def read_cvat(path: Path, options: ImportOptions, faults: Faults) -> list[Source]:
    """The splits (CVAT's subsets) of an annotations.xml, or of the folder that holds it.

    Raises RecordError naming image and shape (or hands it to `faults`).
    """
    file = path if path.is_file() else path / "annotations.xml"
    root = read_xml(file)
    if root.tag != "annotations":
        raise RecordError(f"{file}: has the root <{root.tag}>, expected <annotations> (CVAT for images)")
    if root.find("track") is not None:
        raise RecordError(
            f"{file}: is CVAT for video (tracks). Export the task as `CVAT for images 1.1`, with images"
        )
    subsets: dict[str, list[Element]] = {}
    for image in root.iter("image"):
        subsets.setdefault(image.get("subset") or "", []).append(image)
    if not subsets:
        raise RecordError(f"{file}: holds no <image>, expected CVAT for images 1.1")
    return [
        _source(path, file, subset, images, options, faults)
        for subset, images in subsets.items()
        if options.split in (None, subset)
    ]


def _source(
    path: Path, file: Path, subset: str, images: Sequence[Element], options: ImportOptions, faults: Faults
) -> Source:
    builder, pictures, left_out = DatasetBuilder(": shape "), [], Counter[str]()
    for image in images:
        name = image.get("name") or ""
        where = f"{file}: image {name!r}"
        try:
            if not name.strip():
                raise RecordError(f"{file}: image id {shown(image.get('id'))} has no name")
            width, height = (size_of(image.get(side), f"{where}.{side}") for side in ("width", "height"))
            picture = _picture(file, name, subset, where, options)
            row = builder.add_image(name, width, height, file=name)
        except RecordError as error:
            faults.add(str(error))
            continue
        pictures.append(picture)
        for number, shape in enumerate(image, start=1):
            if shape.tag not in OBJECTS:
                left_out[f"{shape.tag}_shapes_left_out"] += 1
                continue
            try:
                box, outlines = _shape(shape, (width, height), f"{where}: shape {number}")
                builder.add_object(row, shape.get("label") or "", box, number, outlines=outlines)
            except RecordError as error:
                text = str(error)
                faults.add(text if text.startswith(str(file)) else f"{file}: {text}")
    return Source(path, "cvat", builder.build(), pictures, subset, left_out, faults.messages)


def _shape(shape: Element, size: tuple[int, int], where: str) -> tuple[list[float], list[list[float]] | None]:
    """(box xyxy, outlines) of one element."""
    if shape.tag == "box":
        x1, y1, x2, y2 = (number_of(shape.get(key), f"{where}.{key}") for key in _CORNERS)
        turn = number_of(shape.get("rotation"), f"{where}.rotation", default=0.0)
        if not turn:
            return [x1, y1, x2, y2], None
        center = (x1 + x2) / 2, (y1 + y2) / 2
        corners = ((x1, y1), (x2, y1), (x2, y2), (x1, y2))
        return _around([v for corner in corners for v in _turned(corner, center, turn)])
    if shape.tag == "mask":
        left, top, width, height = (
            number_of(shape.get(key), f"{where}.{key}") for key in ("left", "top", "width", "height")
        )
        return [left, top, left + width, top + height], None
    if shape.tag == "ellipse":
        return _around(list(_ellipse(shape, where)))
    points = [value for point in (shape.get("points") or "").split(";") for value in point.split(",")]
    outline = [number_of(value, f"{where}.points") for value in points]
    if len(outline) < 6 or len(outline) % 2:
        raise RecordError(f"{where} has a polygon of {len(outline) / 2:g} points: expected at least 3")
    return _around(outline)


def _ellipse(shape: Element, where: str) -> Iterator[float]:
    cx, cy, rx, ry = (number_of(shape.get(key), f"{where}.{key}") for key in ("cx", "cy", "rx", "ry"))
    turn = number_of(shape.get("rotation"), f"{where}.rotation", default=0.0)
    for step in range(_ELLIPSE_POINTS):
        angle = 2 * pi * step / _ELLIPSE_POINTS
        yield from _turned((cx + rx * cos(angle), cy + ry * sin(angle)), (cx, cy), turn)


def _turned(point: tuple[float, float], center: tuple[float, float], degrees: float) -> tuple[float, float]:
    x, y = point[0] - center[0], point[1] - center[1]
    angle = radians(degrees)
    return center[0] + x * cos(angle) - y * sin(angle), center[1] + x * sin(angle) + y * cos(angle)


def _around(outline: list[float]) -> tuple[list[float], list[list[float]]]:
    x, y = outline[0::2], outline[1::2]
    return [min(x), min(y), max(x), max(y)], [outline]


def _picture(file: Path, name: str, subset: str, where: str, options: ImportOptions) -> Path:
    roots = (
        [options.image_root] if options.image_root is not None else [file.parent / f for f in PICTURE_FOLDERS]
    )
    candidates = [
        picture_path(root, os.path.join(subset, name) if with_subset else name, f"{where}.name",
                     allow_outside=options.allow_outside)
        for root in roots
        for with_subset in (True, False)
    ]  # fmt: skip
    return next((path for path in candidates if is_file(path)), candidates[-1])
