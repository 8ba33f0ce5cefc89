"""How much of what a data set holds: images, objects, classes, sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from coordexp.data.check.names import written_names
from coordexp.data.check.source import Source
from coordexp.eval.coco.sizes import SIZES, size_classes
from coordexp.geometry import FloatArray

QUANTILES = (0, 5, 50, 95, 100)


class Overview(NamedTuple):
    """The first table: a row for each source."""

    name: str
    images: int
    images_without_objects: int
    objects: int
    crowds: int
    classes: int


class ClassCounts(NamedTuple):
    """What there is of one class. median_*: of its boxes, in pixels."""

    name: str
    objects: int
    images: int
    small: int
    medium: int
    large: int
    median_width: float
    median_height: float


class Spread(NamedTuple):
    """A quantity and its values at `QUANTILES` per cent, from the smallest to the largest."""

    name: str
    values: tuple[float, ...]


def overview(source: Source) -> Overview:
    """Counts of a source."""
    dataset = source.dataset
    with_objects = np.unique(dataset.image_M[~dataset.crowd_M])
    return Overview(
        source.name,
        len(dataset.image_ids),
        len(dataset.image_ids) - len(with_objects),
        int((~dataset.crowd_M).sum()),
        int(dataset.crowd_M.sum()),
        len(set(dataset.category_M.tolist())),
    )


def class_rows(source: Source) -> list[ClassCounts]:
    """A row for each class that has objects, the most frequent first. Sizes are those of COCO, by box area."""
    dataset = source.dataset
    names = written_names(dataset)
    kept = np.flatnonzero(~dataset.crowd_M)
    order = kept[np.argsort(dataset.category_M[kept], kind="stable")]
    starts = np.searchsorted(dataset.category_M[order], np.arange(len(names) + 1))
    rows = []
    for k, name in enumerate(names):
        chosen = order[starts[k] : starts[k + 1]]
        if not len(chosen):
            continue
        sides = dataset.boxes_xywh_M4[chosen, 2:]
        small, medium, large = np.bincount(size_classes(sides.prod(axis=1)), minlength=len(SIZES)).tolist()
        width, height = np.median(sides, axis=0).tolist()
        images = len(np.unique(dataset.image_M[chosen]))
        rows.append(ClassCounts(name, len(chosen), images, small, medium, large, width, height))
    return sorted(rows, key=lambda row: (-row.objects, row.name))


def spreads(source: Source) -> list[Spread]:
    """How sizes and counts are spread; quantities that nothing is known of are left out."""
    dataset = source.dataset
    sizes = dataset.sizes_N2[(dataset.sizes_N2 > 0).all(axis=1)].astype(np.float64)
    sides = dataset.boxes_xywh_M4[~dataset.crowd_M, 2:]
    sides = sides[(sides > 0).all(axis=1)]
    per_image = np.bincount(dataset.image_M[~dataset.crowd_M], minlength=len(dataset.image_ids))
    quantities: list[tuple[str, FloatArray]] = [
        ("picture width (pixels)", sizes[:, 0]),
        ("picture height (pixels)", sizes[:, 1]),
        ("picture aspect ratio (longer / shorter side)", sizes.max(axis=1) / sizes.min(axis=1)),
        ("objects in an image", per_image.astype(np.float64)),
        ("box width (pixels)", sides[:, 0]),
        ("box height (pixels)", sides[:, 1]),
        ("box side (square root of the area, pixels)", np.sqrt(sides.prod(axis=1))),
    ]
    return [
        Spread(name, tuple(np.percentile(values, QUANTILES).tolist()))
        for name, values in quantities
        if values.size
    ]


def picture_sizes(source: Source, most: int = 12) -> list[tuple[str, int]]:
    """The most frequent picture sizes, "width x height" and how many; all others together as the last."""
    counts = Counter(f"{width} x {height}" for width, height in source.dataset.sizes_N2.tolist())
    rows: Sequence[tuple[str, int]] = counts.most_common()
    if len(rows) <= most:
        return list(rows)
    return [
        *rows[: most - 1],
        (f"{len(rows) - most + 1} other sizes", sum(count for _, count in rows[most - 1 :])),
    ]
