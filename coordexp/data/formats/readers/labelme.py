"""Labelme: a JSON file for every picture, with shapes of points in pixels.

Rectangles, polygons, circles and masks are objects; shapes of one label and one `group_id` are one object of several
parts. Points, lines and line strips have no extent: they are left out and counted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import cos, hypot, pi, sin
from pathlib import Path
from typing import Any

from coordexp.data.check.source import Source
from coordexp.data.formats.options import ImportOptions
from coordexp.data.formats.paths import picture_path
from coordexp.data.formats.readers.builder import DatasetBuilder, Faults
from coordexp.errors import RecordError
from coordexp.eval.coco.external import load_json
from coordexp.eval.coco.fields import MAX_COORDINATE, parse_number, shown
from coordexp.files import is_file

WITHOUT_EXTENT = ("point", "points", "line", "linestrip")
_CIRCLE_POINTS = 36


@dataclass
class _Object:
    name: str
    number: int
    outlines: list[list[float]]
    is_box: bool


def read_labelme(path: Path, options: ImportOptions, faults: Faults) -> list[Source]:
    """A folder of Labelme files, or one of them.

    Raises RecordError naming file and shape (or hands it to `faults`).
    """
    files = [path] if path.is_file() else sorted(path.rglob("*.json"))
    folder = path.parent if path.is_file() else path
    builder, pictures, left_out = DatasetBuilder(": shape "), [], Counter[str]()
    for file in files:
        try:
            content = load_json(file)
            if not is_labelme(content):
                left_out["files_of_another_kind"] += 1
                continue
            picture = _picture(content, file, folder, options)
            row = builder.add_image(
                Path(os.path.relpath(picture, folder)).as_posix(), *_size(content, file),
                file=Path(os.path.relpath(file, folder)).as_posix(),
            )  # fmt: skip
        except RecordError as error:
            faults.add(str(error))
            continue
        pictures.append(picture)
        for obj in _objects(content["shapes"], file, left_out, faults):
            x, y = ([v for outline in obj.outlines for v in outline[axis::2]] for axis in (0, 1))
            box = (min(x), min(y), max(x), max(y))
            try:
                builder.add_object(
                    row, obj.name, box, obj.number, outlines=None if obj.is_box else obj.outlines
                )
            except RecordError as error:
                faults.add(str(error))
    if not pictures and not faults.messages:
        raise RecordError(f"{path}: holds no Labelme file, expected JSON with `shapes` and `imagePath`")
    return [Source(path, "labelme", builder.build(), pictures, "", left_out, faults.messages)]


def is_labelme(content: Any) -> bool:
    """Whether a JSON value is a Labelme file."""
    return isinstance(content, Mapping) and isinstance(content.get("shapes"), list)


def _objects(shapes: Sequence[Any], file: Path, left_out: Counter[str], faults: Faults) -> list[_Object]:
    """The objects of one file, shapes of one group put together."""
    objects: list[_Object] = []
    groups: dict[tuple[str, str], _Object] = {}
    for number, shape in enumerate(shapes):
        where = f"{file}: shapes[{number}]"
        try:
            if not isinstance(shape, Mapping):
                raise RecordError(f"{where} is {shown(shape)}: expected an object with label and points")
            name, kind = shape.get("label"), shape.get("shape_type") or "polygon"
            if not isinstance(name, str):
                raise RecordError(f"{where}.label is {shown(name)}: expected text")
            if kind in WITHOUT_EXTENT:
                left_out[f"{kind}_shapes_left_out"] += 1
                continue
            outline, is_box = _outline(kind, _points(shape.get("points"), where), where)
        except RecordError as error:
            faults.add(str(error))
            continue
        group = shape.get("group_id")
        key = (name, repr(group)) if isinstance(group, (int, str)) else None
        if key is not None and key in groups:
            groups[key].outlines.append(outline)
            groups[key].is_box = False
            continue
        obj = _Object(name, number, [outline], is_box)
        objects.append(obj)
        if key is not None:
            groups[key] = obj
    return objects


def _outline(kind: Any, points: list[tuple[float, float]], where: str) -> tuple[list[float], bool]:
    """A shape as a flat outline, and whether it is a box."""
    if kind in ("rectangle", "mask") and len(points) >= 2:
        x, y = [point[0] for point in points], [point[1] for point in points]
        x1, y1, x2, y2 = min(x), min(y), max(x), max(y)
        return [x1, y1, x2, y1, x2, y2, x1, y2], True
    if kind == "circle" and len(points) == 2:
        (center_x, center_y), (edge_x, edge_y) = points
        radius = hypot(edge_x - center_x, edge_y - center_y)
        angles = [2 * pi * step / _CIRCLE_POINTS for step in range(_CIRCLE_POINTS)]
        around = [(center_x + radius * cos(angle), center_y + radius * sin(angle)) for angle in angles]
        return [value for point in around for value in point], False
    if kind in ("polygon", "oriented_rectangle", "rotation") and len(points) >= 3:
        return [value for point in points for value in point], False
    known = "rectangle (2 points), polygon (3 or more), circle (2) or mask (2)"
    raise RecordError(f"{where} is a {shown(kind)} of {len(points)} points: expected {known}")


def _points(value: Any, where: str) -> list[tuple[float, float]]:
    if not isinstance(value, list):
        raise RecordError(f"{where}.points is {shown(value)}: expected a list of [x, y]")
    points = []
    for index, point in enumerate(value):
        numbers = (
            [parse_number(v) for v in point] if isinstance(point, list) and len(point) == 2 else [None, None]
        )
        x, y = numbers
        if x is None or y is None or not (abs(x) <= MAX_COORDINATE and abs(y) <= MAX_COORDINATE):
            raise RecordError(f"{where}.points[{index}] is {shown(point)}: expected [x, y] in pixels")
        points.append((x, y))
    return points


def _size(content: Mapping[str, Any], file: Path) -> tuple[int, int]:
    sides = []
    for key in ("imageWidth", "imageHeight"):
        value = content.get(key)
        number = 0.0 if value is None else parse_number(value)
        if number is None or not number.is_integer() or number < 0:
            raise RecordError(f"{file}: {key} is {shown(value)}: expected a whole number of pixels")
        sides.append(int(number))
    return sides[0], sides[1]


def _picture(content: Mapping[str, Any], file: Path, folder: Path, options: ImportOptions) -> Path:
    """`imagePath` from the JSON file's folder where that stays inside, else the picture of that name."""
    name = content.get("imagePath")
    if not isinstance(name, str) or not name.strip():
        raise RecordError(f"{file}: imagePath is {shown(name)}: expected the name of a picture file")
    root = options.image_root or folder
    home = Path(os.path.relpath(file.parent, root)) if options.image_root is None else Path()
    relative = name.replace("\\", "/")
    inside = os.path.normpath(home / relative)
    bare = relative.rsplit("/", 1)[-1]
    choices = [picture_path(root, str(home / relative), f"{file}: imagePath", allow_outside=options.allow_outside)
               if not inside.startswith("..") or options.allow_outside else root / bare]  # fmt: skip
    choices += [file.parent / bare, root / bare, root / "images" / bare]
    found = next((path for path in choices if is_file(path)), None)
    if found is None and inside.startswith(".."):
        raise RecordError(
            f"{file}: imagePath is {name!r}, which leads outside of {root}. Give the folder that holds all pictures "
            "(--image-root), or follow such names (--allow-outside)"
        )
    return found or choices[0]
