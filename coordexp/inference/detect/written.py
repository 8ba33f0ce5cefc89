"""Detections as files: drawn pictures, JSON, and the annotation formats that `coordexp data convert` writes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coordexp.data.check.source import Source
from coordexp.data.formats.exports.coco import export_source
from coordexp.data.formats.exports.labelme import export_labelme
from coordexp.data.formats.exports.yolo import export_yolo
from coordexp.data.formats.readers.builder import DatasetBuilder
from coordexp.files import atomic_file, write_json
from coordexp.inference.detect.job import Found
from coordexp.inference.detections import Detections

FORMATS = ("json", "coco", "yolo", "labelme")
DRAWN, DETECTIONS, COCO, COCO_RESULTS = "drawn", "detections.json", "coco.json", "coco_results.json"
_PILLOW = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}


def drawn_path(folder: Path, name: str) -> Path:
    """Where the picture with its boxes goes; formats that browsers do not show become JPEG."""
    path = folder / DRAWN / name
    return path if path.suffix.lower() in _PILLOW else path.with_name(f"{path.name}.jpg")


def write_drawn(folder: Path, found: Detections) -> None:
    """The picture with its boxes."""
    path = drawn_path(folder, found.name)
    with atomic_file(path, "wb", sync=False) as stream:
        found.draw().save(stream, _PILLOW[path.suffix.lower()], quality=92)


def write_detections(folder: Path, found: Found, form: str) -> Path:
    """Write all detections in one of `FORMATS`; what an earlier run wrote in it is replaced. Returns where.

    json: `detections.json`, with scores, text and what was left out.  coco: `coco.json` as an annotation file, and
    `coco_results.json` with the scores.  yolo, labelme: a folder of that name, its pictures linked.
    """
    if form == "json":
        write_json(folder / DETECTIONS, as_json(found))
        return folder / DETECTIONS
    source = source_of(found)
    if form == "coco":
        export_source(source, folder / COCO)
        write_json(folder / COCO_RESULTS, _coco_results(found.detections, source), indent=None)
        return folder / COCO
    shutil.rmtree(folder / form, ignore_errors=True)
    if form == "yolo":
        classes = found.detections[0].classes
        export_yolo([source], folder / form, names=classes)
    else:
        export_labelme([source], folder / form)
    return folder / form


def as_json(found: Found) -> dict[str, Any]:
    """Plain values of everything."""
    return {
        "pictures": [
            {"file": str(file), **one.to_dict()}
            for file, one in zip(found.files, found.detections, strict=True)
        ],
        "left_out": [
            {"file": str(picture.path), "image": picture.name, "reason": why}
            for picture, why in found.left_out
        ],
    }


def source_of(found: Found) -> Source:
    """The detections as annotations in pixels; categories in the order of `classes`, else of the names sorted."""
    builder = DatasetBuilder()
    for name in _categories(found.detections):
        builder.add_category(name)
    for one in found.detections:
        row = builder.add_image(one.name, one.width, one.height, file=one.name)
        rows = zip(one.labels, one.xyxy.tolist(), one.points, strict=True)
        for number, (label, box, points) in enumerate(rows):
            builder.add_object(row, label, box, number, outlines=None if len(points) == 4 else [points])
    return Source(Path(DETECTIONS), "detections", builder.build(), found.files)


def _categories(detections: Sequence[Detections]) -> Sequence[str]:
    asked = next((one.classes for one in detections if one.classes is not None), None)
    return sorted({label for one in detections for label in one.labels}) if asked is None else asked


def _coco_results(detections: Sequence[Detections], source: Source) -> list[dict[str, Any]]:
    data = source.dataset
    ids = {name: int(number) for name, number in zip(data.category_names, data.category_ids, strict=True)}
    return [
        entry
        for image_id, one in zip(data.image_ids, detections, strict=True)
        for entry in one.to_coco(image_id, ids)
    ]
