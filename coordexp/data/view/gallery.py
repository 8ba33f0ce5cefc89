"""A data set as a page of pictures: every image with its objects, filtered by description, size and number.

write_view(read_sources(Path("data/train.jsonl"), options)[0], Path("data_view/train.html"))
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from coordexp.data.check.source import Source
from coordexp.errors import RecordError
from coordexp.eval.gallery.cards import Gallery, GalleryBox, GalleryCard, Panel, thinned
from coordexp.eval.gallery.outlines import outline_parts
from coordexp.eval.gallery.thumbnails import embedded
from coordexp.eval.report.page import write_page
from coordexp.geometry import xywh_to_xyxy
from coordexp.pictures import picture_facts

MAX_OBJECTS, MANY_IMAGES = 150, 500
"""Drawn in one picture; and the number of images from which on thumbnails have coarser outlines."""
MAX_POINTS, MAX_POINTS_OF_MANY = 80, 12
NUM_LARGE = 36
"""Up to so many images are shown in full size."""
_SORTS = (
    ("row", 1, "order of the file"),
    ("objects", -1, "most objects"),
    ("objects", 1, "fewest objects"),
    ("smallest", 1, "smallest object"),
)


def data_gallery(source: Source, *, most: int | None = None) -> Gallery:
    """Cards of the images in the order of the file, of the first `most` of them."""
    rows = range(len(source.pictures))[:most]
    pictures = embedded([source.pictures[row] for row in rows], [len(rows) <= NUM_LARGE] * len(rows))
    order = np.argsort(source.dataset.image_M, kind="stable")
    counts = np.bincount(source.dataset.image_M, minlength=len(source.pictures))
    objects_of = np.split(order, np.cumsum(counts)[:-1])
    extent = 1.0 if source.kind == "jsonl" else 0.0  # bins name pixels, other formats have edges
    points = MAX_POINTS if len(rows) < MANY_IMAGES else MAX_POINTS_OF_MANY
    cards = [
        _card(source, row, objects_of[row].tolist(), picture, extent, points)
        for row, picture in zip(rows, pictures, strict=True)
    ]
    return Gallery(cards=cards, sorts=_SORTS)


def write_view(source: Source, output: Path, *, most: int | None = None) -> Gallery:
    """Write the page; returns what it shows."""
    gallery = data_gallery(source, most=most)
    num_images, num_objects = len(source.pictures), len(source.dataset)
    num_descs = len(set(source.dataset.category_M.tolist()))
    summary = f"{num_images} images, {num_objects} objects of {num_descs} descriptions."
    if len(gallery.cards) < num_images:
        summary += f" The first {len(gallery.cards)} images are shown."
    if gallery.num_missing:
        summary += f" {gallery.num_missing} pictures could not be read."
    write_page(
        output, "gallery_page.html.jinja", title=source.name, summary=summary, gallery=gallery, roles={}
    )
    return gallery


def _card(
    source: Source, row: int, objects: list[int], picture: str | None, extent: float, points: int
) -> GalleryCard:
    dataset = source.dataset
    boxes_M4 = xywh_to_xyxy(dataset.boxes_xywh_M4[objects]) + np.array((0.0, 0.0, extent, extent))
    names = dataset.category_names
    boxes = [
        GalleryBox(
            "object",
            names[int(dataset.category_M[m])] + (" (crowd)" if dataset.crowd_M[m] else ""),
            box,
            outlines=thinned(outline_parts(dataset.segmentations[m]), points),
        )
        for m, box in zip(objects[:MAX_OBJECTS], boxes_M4.tolist(), strict=False)
    ]
    width, height = _size(source, row)
    areas = np.prod(boxes_M4[:, 2:] - boxes_M4[:, :2], axis=1)
    return GalleryCard(
        title=source.image_name(row),
        width=width,
        height=height,
        picture=picture,
        panels=[Panel(boxes, num_hidden=len(objects) - len(boxes), note=_count(len(objects)))],
        values={"row": row, "objects": len(objects), "smallest": float(areas.min(initial=1e12))},
    )


def _count(number: int) -> str:
    return f"{number} object{'' if number == 1 else 's'}"


def _size(source: Source, row: int) -> tuple[int, int]:
    """Pixels of the picture, as the data says, or as its file does; a square where neither is known."""
    width, height = source.dataset.sizes_N2[row].tolist()
    path = source.pictures[row]
    if width and height:
        return width, height
    try:
        facts = None if path is None else picture_facts(path)
    except RecordError:
        facts = None
    return (1000, 1000) if facts is None else (facts.width, facts.height)
