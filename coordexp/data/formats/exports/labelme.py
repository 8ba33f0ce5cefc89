"""Labelme: a JSON file beside every picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coordexp.data.check.source import Source
from coordexp.data.formats.exports.folder import (
    boxes_in_picture,
    check_target,
    flat_names,
    objects_by_image,
    one_outline,
    place_picture,
    split_name,
)
from coordexp.files import atomic_folder, write_json


def export_labelme(sources: Sequence[Source], output: Path, *, pictures: str = "link") -> Counter[str]:
    """Write the sources as Labelme files, a folder for each split; completely or not at all. Returns what was counted.

    Objects of one outline are polygons, the others rectangles.
    """
    check_target(output, pictures)
    counts = Counter(images_written=0, objects_written=0)
    with atomic_folder(output) as folder:
        for source in sources:
            home = folder / split_name(source) if len(sources) > 1 else folder
            boxes = boxes_in_picture(source)
            for row, (name, objects) in enumerate(
                zip(flat_names(source), objects_by_image(source), strict=True)
            ):
                width, height = source.dataset.sizes_N2[row].tolist()
                content = {
                    "version": "5.0.1",
                    "flags": {},
                    "shapes": [_shape(source, m, boxes[m].tolist()) for m in objects],
                    "imagePath": name,
                    "imageData": None,
                    "imageHeight": height,
                    "imageWidth": width,
                }
                write_json(home / f"{Path(name).stem}.json", content, sync=False)
                place_picture(source.pictures[row], home / name, pictures)
                counts["images_written"] += 1
                counts["objects_written"] += len(objects)
    return counts


def _shape(source: Source, m: int, box: Sequence[float]) -> dict[str, Any]:
    outline = one_outline(source, m)
    points, kind = (np.reshape(box, (2, 2)), "rectangle") if outline is None else (outline, "polygon")
    return {
        "label": source.dataset.category_names[source.dataset.category_M[m]],
        "points": [[round(x, 3), round(y, 3)] for x, y in points.tolist()],
        "group_id": None,
        "shape_type": kind,
        "flags": {},
    }
