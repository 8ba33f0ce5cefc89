"""Small annotated data sets with pictures, as the tools of the field export them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from coordexp.data.check.source import Source
from coordexp.data.formats.options import ImportOptions
from coordexp.data.formats.readers.builder import Faults
from coordexp.data.formats.readers.sources import read_sources
from coordexp.eval.coco.annotations import read_dataset
from coordexp.geometry import xywh_to_xyxy

NAMES = ("cat", "dog", "Äpfel & Birnen")
SIZE = (100, 50)
"""Of the pictures beside files written by hand."""


def write(path: Path, text: str | bytes) -> Path:
    """A file with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(path: Path, faults: Faults | None = None, **options: Any) -> list[Source]:
    """The sources of a file or folder of any format, with their pictures."""
    return read_sources(path, ImportOptions(find_pictures=True, **options), faults=faults)


def noise(path: Path, size: tuple[int, int], seed: int = 0) -> Path:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def coco(
    sizes: Sequence[tuple[int, int]], objects: Sequence[tuple[int, int, Sequence[float]]], **keys: Any
) -> dict[str, Any]:
    """A COCO data set: images of these sizes, objects as (image, class, box xywh); keys of every annotation."""
    return {
        "images": [
            {"id": i, "file_name": f"picture {i}.png", "width": w, "height": h}
            for i, (w, h) in enumerate(sizes)
        ],
        "annotations": [
            {"id": n + 1, "image_id": image, "category_id": k, "bbox": list(box), **keys}
            for n, (image, k, box) in enumerate(objects)
        ],
        "categories": [{"id": k, "name": name} for k, name in enumerate(NAMES)],
    }


def source(folder: Path, value: dict[str, Any], *, split: str = "") -> Source:
    """A source of a COCO data set whose pictures are made in `folder`."""
    pictures = [
        noise(folder / image["file_name"], (image["width"], image["height"]), seed=n)
        for n, image in enumerate(value["images"])
    ]
    return Source(folder / "gt.json", "coco", read_dataset(value), pictures, split)


def objects_of(found: Source) -> list[list[tuple[str, list[float]]]]:
    """For every image its objects as (name, box xyxy), in the order of their boxes."""
    dataset = found.dataset
    boxes = xywh_to_xyxy(dataset.boxes_xywh_M4).tolist()
    per_image: list[list[tuple[str, list[float]]]] = [[] for _ in dataset.image_ids]
    for image, category, box in zip(
        dataset.image_M.tolist(), dataset.category_M.tolist(), boxes, strict=True
    ):
        per_image[image].append((dataset.category_names[category], box))
    return [sorted(objects, key=lambda entry: (entry[1], entry[0])) for objects in per_image]


def half_bins(size: tuple[int, int]) -> np.ndarray:
    """Half a bin in pixels of a picture, as xyxy."""
    return np.maximum(np.array([*size, *size]) - 1, 1) / 999 / 2
