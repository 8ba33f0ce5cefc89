"""What a gallery shows, and its form in the page.

A page holds its cards as JSON, and its script (templates/gallery_script.js.jinja) draws those of one screenful; so a
gallery of thousands of images opens at once and stays small: a box is some thirty characters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import orjson
from markupsafe import Markup

from coordexp.geometry import FloatArray

VIEW_SIDE = 1000
"""Longer side of a picture in the units that boxes are written in, which are whole ones."""
SMALL_PICTURE = 160
"""Pictures up to this side, in pixels, are shown pixel by pixel."""
ROLES = ("gt", "fn", "tp", "fp", "object")
"""Annotated and found, missed, right and wrong predictions; objects of a data set, coloured by description."""

Outlines = Sequence[Sequence[float]]
"""Parts of a mask, each x, y, x, y, ..., in pixels."""


class GalleryBox(NamedTuple):
    """box_xyxy: pixels, x2 and y2 being edges.  score, iou: None where there is none.  outlines: empty for a box."""

    role: str
    desc: str
    box_xyxy: Sequence[float]
    score: float | None = None
    iou: float | None = None
    outlines: Outlines = ()


@dataclass(frozen=True)
class Panel:
    """What one run, or a data set, says of an image.

    counts: matched, false and missed; None without a match.  num_hidden: boxes that are not drawn.  text: what the
    model wrote.  note: what else there is to say.
    """

    boxes: Sequence[GalleryBox]
    counts: tuple[int, int, int] | None = None
    num_hidden: int = 0
    text: str | None = None
    note: str = ""


@dataclass(frozen=True)
class GalleryCard:
    """One image.

    width, height: of the picture in full.  picture: as a data URI, None where there is none.  tags: see `Gallery`.
    values: what cards are sorted by.
    """

    title: str
    width: int
    height: int
    picture: str | None
    panels: Sequence[Panel]
    tags: Sequence[int] = ()
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Gallery:
    """Cards, and the ways to look at them.

    runs: name and colour of each panel; empty for a data set.  tags: words for each number in `GalleryCard.tags`; the
    first `num_groups` can be chosen from a menu, the others are where links lead.
    sorts: key of `values`, 1 (ascending) or -1, words.
    """

    cards: Sequence[GalleryCard]
    sorts: Sequence[tuple[str, int, str]]
    runs: Sequence[Mapping[str, str]] = ()
    tags: Sequence[str] = ()
    num_groups: int = 0

    @property
    def num_missing(self) -> int:
        """Cards without a picture."""
        return sum(card.picture is None for card in self.cards)

    @property
    def descs(self) -> list[str]:
        """Every description of a box, by name."""
        return sorted({box.desc for card in self.cards for panel in card.panels for box in panel.boxes})

    def as_json(self) -> Markup:
        """For a `<script type="application/json">`: nothing in it ends the element."""
        number_of = {desc: number for number, desc in enumerate(self.descs)}
        content = {
            "side": VIEW_SIDE,
            "small": SMALL_PICTURE,
            "roles": ROLES,
            "runs": list(self.runs),
            "descs": self.descs,
            "tags": list(self.tags),
            "cards": [_card(card, number_of) for card in self.cards],
        }
        text = orjson.dumps(content).decode()
        for character in "<>&":
            text = text.replace(character, f"\\u{ord(character):04x}")
        return Markup(text)


def _card(card: GalleryCard, number_of: Mapping[str, int]) -> dict[str, Any]:
    scale = VIEW_SIDE / max(card.width, card.height)
    size = (card.width, card.height)
    return {
        "title": card.title,
        "size": size,
        "src": card.picture,
        "tags": list(card.tags),
        "values": dict(card.values),
        "panels": [_panel(panel, number_of, scale, size) for panel in card.panels],
    }


def _panel(panel: Panel, number_of: Mapping[str, int], scale: float, size: tuple[int, int]) -> dict[str, Any]:
    content: dict[str, Any] = {"boxes": [_box(box, number_of, scale, size) for box in panel.boxes]}
    extras = {"counts": panel.counts, "hidden": panel.num_hidden, "text": panel.text, "note": panel.note}
    return content | {key: value for key, value in extras.items() if value}


def _box(box: GalleryBox, number_of: Mapping[str, int], scale: float, size: tuple[int, int]) -> list[Any]:
    """[role, desc, x1, y1, x2, y2, score, IoU, outlines], shorter where the last ones are nothing."""
    corners = np.clip(np.reshape(np.asarray(box.box_xyxy, dtype=np.float64), (2, 2)), 0, size) * scale
    row: list[Any] = [
        ROLES.index(box.role),
        number_of[box.desc],
        *corners.round().astype(int).ravel().tolist(),
    ]
    row.append(None if box.score is None else round(float(box.score), 3))
    row.append(None if box.iou is None else round(float(box.iou), 2))
    row.append([_units(part, scale, size) for part in box.outlines] or None)
    while row[-1] is None:
        row.pop()
    return row


def _units(part: Sequence[float], scale: float, size: tuple[int, int]) -> list[int]:
    points: FloatArray = np.clip(np.reshape(np.asarray(part, dtype=np.float64), (-1, 2)), 0, size) * scale
    units: list[int] = points.round().astype(int).ravel().tolist()
    return units


def thinned(outlines: Outlines, most: int) -> list[list[float]]:
    """Outlines of at most `most` points in all (of three in each part), evenly left out."""
    total = sum(len(part) // 2 for part in outlines)
    if total <= most:
        return [list(part) for part in outlines]
    kept = []
    for part in outlines:
        points = np.reshape(np.asarray(part, dtype=np.float64), (-1, 2))
        count = max(3, len(points) * most // total)
        chosen = np.unique(np.linspace(0, len(points) - 1, min(count, len(points))).round().astype(int))
        kept.append(points[chosen].ravel().tolist())
    return kept
