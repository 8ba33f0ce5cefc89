"""The gallery of a report: the worst, the best and the most changed images, with boxes as SVG over the picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from coordexp.errors import RecordError
from coordexp.eval.detection import ImageMatch
from coordexp.eval.predictions.image_result import ImageResult
from coordexp.eval.report.numbers import RunNumbers
from coordexp.eval.report.page import data_uri
from coordexp.eval.report.pictures import ROLE_COLORS, XYXY, Role
from coordexp.pictures import open_picture

VIEW_SIDE, VIEW_SIDE_OF_MANY = 400.0, 300.0
"""Longer side of a panel in its own units, with one run and with several; the page scales it."""
SMALL_PICTURE = 160
"""Pictures up to this side are shown pixel by pixel."""
MAX_PICTURE_SIDE = 640
"""Larger pictures are reduced to this before they are embedded, in pixels."""
MAX_BOXES = 60
"""Drawn per role and panel, the most confident first; the others are counted."""
MAX_LABELS = 12
"""Written per role and panel; the other boxes show their words when the pointer rests on them."""
MAX_TEXT = 1500
_LABEL_HEIGHT, _CHARACTER_WIDTH, _MAX_LABEL = 15.0, 6.6, 26


class Box(NamedTuple):
    """A rectangle in view units. label: on the picture;  title: shown when the pointer rests on it."""

    role: str
    x: float
    y: float
    width: float
    height: float
    label: str
    title: str
    label_x: float
    label_y: float
    label_width: float


class Panel(NamedTuple):
    """One run's answer on one image."""

    run: str
    status: str
    is_perfect: bool
    boxes: list[Box]
    num_hidden: int
    text: str | None
    dropped: str


@dataclass(frozen=True)
class GalleryCard:
    """One image. picture: None where the file is missing. sort: values that the page can sort by."""

    title: str
    groups: list[str]
    picture: str | None
    is_small: bool
    view_width: float
    view_height: float
    panels: list[Panel]
    sort: dict[str, float] = field(default_factory=dict)


def role_colors() -> dict[str, tuple[str, str]]:
    """CSS class -> (colour, words) of every role."""
    return {role.name.lower(): (color, role.value) for role, color in ROLE_COLORS.items()}


def select_images(runs: Sequence[RunNumbers], num_worst: int, num_best: int) -> dict[int, list[str]]:
    """Image index -> the groups it is in: "worst" and "best" of the last run, "changed" between first and last.

    Worst: lowest F1, then most errors, then loosest boxes. Best: highest F1, then most objects found. Changed: as
    many as best, the largest difference of F1 first.
    """
    last = runs[-1].matches
    indices = range(len(last))
    groups: dict[int, list[str]] = {}
    for index in sorted(indices, key=lambda i: (*_badness(last[i]), i))[:num_worst]:
        if last[index].scores.f1 < 1.0:
            groups.setdefault(index, []).append("worst")
    by_quality = sorted(indices, key=lambda i: (-last[i].scores.f1, -last[i].counts.tp, -last[i].mean_iou, i))
    for index in by_quality[:num_best]:
        if last[index].counts.tp:
            groups.setdefault(index, []).append("best")
    if len(runs) > 1:
        change = {i: last[i].scores.f1 - runs[0].matches[i].scores.f1 for i in indices}
        for index in sorted(indices, key=lambda i: (-abs(change[i]), i))[:num_best]:
            if change[index]:
                groups.setdefault(index, []).append("changed")
    return groups


def gallery_cards(runs: Sequence[RunNumbers], num_worst: int, num_best: int) -> list[GalleryCard]:
    """Cards of the selected images, worst first."""
    cards = [_card(runs, index, groups) for index, groups in select_images(runs, num_worst, num_best).items()]
    return sorted(cards, key=lambda card: (card.sort["f1"], -card.sort["errors"]))


def load_picture(path: Path) -> str | None:
    """An image file as a data URI no larger than the page needs; None when there is no readable image."""
    try:
        image = open_picture(path)
    except RecordError:
        return None
    image.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    if max(image.size) <= SMALL_PICTURE:  # drawings of a few pixels: keep every one
        image.save(stream, "PNG", optimize=True)
        return data_uri(stream.getvalue(), "image/png")
    image.save(stream, "JPEG", quality=82, optimize=True)
    return data_uri(stream.getvalue(), "image/jpeg")


def panel_boxes(image: ImageResult, match: ImageMatch, scale: float, extent: float) -> tuple[list[Box], int]:
    """Boxes of one panel and how many more there are than are drawn.

    extent: 1 where x2, y2 name the last pixel of an object, 0 where they are its edge (COCO).
    """
    ious = {p: iou for p, _, iou in match.pairs}
    found = {g for _, g, _ in match.pairs}
    by_role: dict[Role, list[tuple[XYXY, str, str]]] = {Role.GT: [], Role.FN: [], Role.FP: [], Role.TP: []}
    for g, (desc, box) in enumerate(zip(image.gt.descs, image.gt.boxes_N4.tolist(), strict=True)):
        if not image.gt.crowd_N[g]:
            role = Role.GT if g in found else Role.FN
            by_role[role].append((box, desc, f"{role.value}: {desc}"))
    pred_boxes = image.pred.boxes_N4.tolist()
    for p in np.argsort(-image.pred.scores_N, kind="stable").tolist():
        if p in match.ignored:
            continue
        desc, score = image.pred.descs[p], image.pred.scores_N[p]
        role = Role.TP if p in ious else Role.FP
        overlap = f", IoU {ious[p]:.2f}" if p in ious else ""
        title = f"{role.value}: {desc}, score {score:.3f}{overlap}"
        by_role[role].append((pred_boxes[p], f"{_short(desc)} {score:.2f}", title))
    boxes, hidden = [], 0
    for role, entries in by_role.items():
        hidden += max(0, len(entries) - MAX_BOXES)
        for place, (box_xyxy, label, title) in enumerate(entries[:MAX_BOXES]):
            shown = label if place < MAX_LABELS and role is not Role.GT else ""
            boxes.append(_box(role, box_xyxy, shown, title, scale, extent, image))
    return boxes, hidden


def _card(runs: Sequence[RunNumbers], index: int, groups: list[str]) -> GalleryCard:
    last = runs[-1]
    image = last.images[index]
    scale = (VIEW_SIDE if len(runs) == 1 else VIEW_SIDE_OF_MANY) / max(image.width, image.height)
    matches = [numbers.matches[index] for numbers in runs]
    panels = [_panel(numbers, index, scale) for numbers in runs]
    counts = matches[-1].counts
    return GalleryCard(
        title=image.file_name or f"image {image.image_id}",
        groups=groups,
        picture=load_picture(last.run.image_root / image.file_name) if image.file_name else None,
        is_small=max(image.width, image.height) <= SMALL_PICTURE,
        view_width=round(image.width * scale, 1),
        view_height=round(image.height * scale, 1),
        panels=panels,
        sort={
            "f1": round(matches[-1].scores.f1, 6),
            "errors": counts.fp + counts.fn,
            "iou": round(matches[-1].mean_iou, 6),
            "objects": int((~image.gt.crowd_N).sum()),
            "change": round(matches[-1].scores.f1 - matches[0].scores.f1, 6),
        },
    )


def _panel(numbers: RunNumbers, index: int, scale: float) -> Panel:
    image, match = numbers.images[index], numbers.matches[index]
    boxes, hidden = panel_boxes(image, match, scale, numbers.run.box_extent)
    tp, fp, fn = match.counts
    trace = numbers.run.traces.get(image.image_id)
    text = None if trace is None else trace.text
    if text is not None and len(text) > MAX_TEXT:
        text = f"{text[:MAX_TEXT]} … ({len(text) - MAX_TEXT} more characters)"
    return Panel(
        run=numbers.run.name,
        status=f"F1 {match.scores.f1:.2f} · {tp} matched · {fp} false · {fn} missed",
        is_perfect=match.scores.f1 == 1.0,
        boxes=boxes,
        num_hidden=hidden,
        text=text,
        dropped=", ".join(f"{reason.replace('_', ' ')}: {count}" for reason, count in image.errors.items()),
    )


def _box(
    role: Role, box_xyxy: XYXY, label: str, title: str, scale: float, extent: float, image: ImageResult
) -> Box:
    x1, y1, x2, y2 = box_xyxy
    left, right = (min(max(0.0, x), float(image.width)) * scale for x in (x1, x2 + extent))
    top, bottom = (min(max(0.0, y), float(image.height)) * scale for y in (y1, y2 + extent))
    label = _short(label, _MAX_LABEL)
    label_width = len(label) * _CHARACTER_WIDTH + 7
    label_x = max(0.0, min(left, image.width * scale - label_width))
    label_y = _label_y(role, top, bottom, image.height * scale)
    return Box(
        role=role.name.lower(),
        x=round(left, 1),
        y=round(top, 1),
        width=round(max(1.0, right - left), 1),
        height=round(max(1.0, bottom - top), 1),
        label=label,
        title=title,
        label_x=round(label_x, 1),
        label_y=round(label_y, 1),
        label_width=round(label_width, 1),
    )


def _label_y(role: Role, top: float, bottom: float, view_height: float) -> float:
    """Missed objects are named below their box and predictions above, inside it where there is no room."""
    if role is Role.FN:
        return bottom if bottom + _LABEL_HEIGHT <= view_height else bottom - _LABEL_HEIGHT
    return top - _LABEL_HEIGHT if top >= _LABEL_HEIGHT else top


def _badness(match: ImageMatch) -> tuple[float, int, float]:
    return match.scores.f1, -(match.counts.fp + match.counts.fn), match.mean_iou


def _short(text: str, length: int = 20) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
