"""Drawn samples for the page: pictures with their boxes and outlines over them."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from coordexp.data.check.findings import Finding
from coordexp.data.check.source import Source
from coordexp.errors import RecordError
from coordexp.eval.coco.segmentation import is_run_length, read_outlines
from coordexp.geometry import xywh_to_xyxy
from coordexp.pictures import open_picture

MAX_SIDE = 460
"""Pixels of the longer side of an embedded picture."""
_CARD_WIDTH = 280
"""About as many pixels a picture has on the page."""
_LETTER_WIDTH = 7
MAX_OBJECTS = 150
"""Drawn in one picture; those beyond are counted."""
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2", "#B8B8B8")
"""Okabe and Ito's, in turn by class; readers with any colour vision can tell them apart."""


class DrawnShape(NamedTuple):
    """An object in pixels of its picture.

    points: of its outline ("x,y x,y ..."), None for a box.  label_ends: whether the name stands at the right edge of
    the box, since it has no room from the left edge on.
    """

    name: str
    color: str
    x: float
    y: float
    width: float
    height: float
    points: str | None
    label_ends: bool


@dataclass(frozen=True)
class Sample:
    """One card of the contact sheet.

    picture: as a data URI.  width, height: of the picture in full.  unit: pixels of it to one on the page.
    badges: kinds of findings that the image is part of.
    """

    title: str
    picture: str
    width: int
    height: int
    unit: float
    shapes: Sequence[DrawnShape]
    num_hidden: int
    badges: Sequence[str]


def draw_samples(source: Source, findings: Sequence[Finding], count: int, seed: int = 0) -> list[Sample]:
    """Up to `count` images: half of them such that findings name, the others drawn by `seed`.

    Pictures that cannot be opened are left out.
    """
    kinds: dict[int, list[str]] = {}
    for finding in findings:
        for row in finding.images:
            kinds.setdefault(row, []).append(finding.kind.replace("_", " "))
    order = list(range(len(source.pictures)))
    random.Random(seed).shuffle(order)
    suspicious = _one_of_each_kind(findings)[: count // 2]
    samples: list[Sample] = []
    for row in dict.fromkeys([*suspicious, *order]):
        if len(samples) == count:
            break
        sample = _sample(source, row, kinds.get(row, ()))
        if sample is not None:
            samples.append(sample)
    return samples


def _one_of_each_kind(findings: Sequence[Finding]) -> list[int]:
    """Rows that findings name: the first of each, then the second of each, and so on."""
    longest = max((len(finding.images) for finding in findings), default=0)
    turns = [
        finding.images[turn]
        for turn in range(min(longest, 50))
        for finding in findings
        if turn < len(finding.images)
    ]
    return list(dict.fromkeys(turns))


def _sample(source: Source, row: int, badges: Sequence[str]) -> Sample | None:
    path = source.pictures[row]
    try:
        if path is None:
            return None
        picture = open_picture(path)
    except RecordError:
        return None
    rows = np.flatnonzero(source.dataset.image_M == row).tolist()
    shapes = [_shape(source, m, picture.width) for m in rows[:MAX_OBJECTS]]
    return card(source.image_name(row), picture, shapes, badges, num_hidden=len(rows) - len(shapes))


def card(
    title: str,
    picture: Image.Image,
    shapes: Sequence[DrawnShape],
    badges: Sequence[str],
    *,
    num_hidden: int = 0,
) -> Sample:
    """A card of the sheet. num_hidden: objects that are not among the shapes."""
    small = picture.copy()
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    written = io.BytesIO()
    small.save(written, "JPEG", quality=82)
    return Sample(
        title=title,
        picture=f"data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode('ascii')}",
        width=picture.width,
        height=picture.height,
        unit=picture.width / _CARD_WIDTH,
        shapes=shapes,
        num_hidden=num_hidden,
        badges=badges,
    )


def drawn_shape(
    name: str, box_xyxy: Sequence[float], points: str | None, *, number: int, picture_width: int
) -> DrawnShape:
    """A box, or an outline with its box. number: of its class, which gives the colour."""
    x1, y1, x2, y2 = box_xyxy
    label_ends = x1 + len(name) * _LETTER_WIDTH * picture_width / _CARD_WIDTH > picture_width
    return DrawnShape(name, COLORS[number % len(COLORS)], x1, y1, x2 - x1, y2 - y1, points, label_ends)


def _shape(source: Source, m: int, picture_width: int) -> DrawnShape:
    dataset = source.dataset
    category = int(dataset.category_M[m])
    box = xywh_to_xyxy(dataset.boxes_xywh_M4[m]).tolist()
    name = dataset.category_names[category] + (" (crowd)" if dataset.crowd_M[m] else "")
    points = _points(dataset.segmentations[m])
    return drawn_shape(name, box, points, number=category, picture_width=picture_width)


def _points(segmentation: object) -> str | None:
    """The first part of an outline, None for a box and for what is no outline."""
    if segmentation is None or is_run_length(segmentation):
        return None
    try:
        parts = read_outlines(segmentation, "")
    except RecordError:
        return None
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in parts[0].tolist()) if parts else None
