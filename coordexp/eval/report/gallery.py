"""The gallery of a report: every image of the runs, the worst first, with what each run found and missed in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from coordexp.eval.detection import ImageMatch
from coordexp.eval.gallery.cards import Gallery, GalleryBox, GalleryCard, Panel, thinned
from coordexp.eval.gallery.outlines import RunOutlines
from coordexp.eval.gallery.thumbnails import embedded
from coordexp.eval.predictions.image_result import ImageResult
from coordexp.eval.report.figures import run_colors
from coordexp.eval.report.numbers import RunNumbers
from coordexp.eval.report.pictures import ROLE_COLORS

MAX_BOXES = 60
"""Drawn per role and panel, the most confident first; the others are counted."""
MAX_TEXT = 1500
MAX_POINTS = 80
"""Of an object's outline; the others are left out evenly."""
MANY_IMAGES = 500
"""From here on an image that is not among the worst, best or changed has fewer boxes and points, and no text."""
_MAX_BOXES_OF_MANY, _MAX_POINTS_OF_MANY = 25, 12

_SORTS = (
    ("f1", 1, "F1, worst first"),
    ("f1", -1, "F1, best first"),
    ("errors", -1, "most errors"),
    ("iou", 1, "loosest boxes"),
    ("objects", -1, "most objects"),
)
_SORTS_OF_SEVERAL = (("change", -1, "gained most"), ("change", 1, "lost most"))


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


def report_gallery(
    runs: Sequence[RunNumbers],
    *,
    num_worst: int,
    num_best: int,
    num_thumbnails: int,
    groups: Mapping[str, Sequence[int]],
    links: Mapping[str, Sequence[int]],
) -> Gallery:
    """Cards of the selected images in full size and of `num_thumbnails` others, worst first.

    groups, links: words -> rows of images, for the menu and for links from tables; empty ones are left out.
    """
    selected = select_images(runs, num_worst, num_best)
    last = runs[-1].matches
    others = [i for i in range(len(last)) if i not in selected]
    others = sorted(others, key=lambda i: (*_badness(last[i]), i))[:num_thumbnails]
    shown = sorted([*selected, *others], key=lambda i: (*_badness(last[i])[:2], i))
    own = {name: [i for i in shown if name in selected.get(i, ())] for name in ("worst", "best", "changed")}
    in_menu = {words: rows for words, rows in (own | dict(groups)).items() if rows}
    tags_of = _tags(shown, [*in_menu.values(), *links.values()])
    pictures = embedded([_path(runs[-1], index) for index in shown], [index in selected for index in shown])
    outlines = [RunOutlines.of(numbers.run.detections.coco) for numbers in runs]
    is_full = {i: i in selected or len(shown) <= MANY_IMAGES for i in shown}
    return Gallery(
        cards=[
            _card(runs, outlines, i, picture, tags_of[i], is_full[i])
            for i, picture in zip(shown, pictures, strict=True)
        ],
        sorts=_SORTS + (_SORTS_OF_SEVERAL if len(runs) > 1 else ()),
        runs=[
            {"name": numbers.run.name, "color": color}
            for numbers, color in zip(runs, run_colors(len(runs)), strict=True)
        ],
        tags=[*in_menu, *links],
        num_groups=len(in_menu),
    )


def drawn_boxes(
    image: ImageResult, match: ImageMatch, outlines: RunOutlines, extent: float, *, full: bool = True
) -> tuple[list[GalleryBox], int]:
    """Boxes of one panel and how many more there are than are drawn.

    extent: 1 where x2, y2 name the last pixel of an object, 0 where they are its edge (COCO).
    full: False draws fewer of them, with coarser outlines.
    """
    most_boxes, most_points = (MAX_BOXES, MAX_POINTS) if full else (_MAX_BOXES_OF_MANY, _MAX_POINTS_OF_MANY)
    ious = {p: iou for p, _, iou in match.pairs}
    found = {g for _, g, _ in match.pairs}
    by_role: dict[str, list[GalleryBox]] = {"gt": [], "fn": [], "fp": [], "tp": []}
    for g, desc in enumerate(image.gt.descs):
        if not image.gt.crowd_N[g]:
            role = "gt" if g in found else "fn"
            parts = thinned(outlines.of_gt(image, g), most_points)
            by_role[role].append(GalleryBox(role, desc, _edges(image.gt.boxes_N4[g], extent), outlines=parts))
    for p in np.argsort(-image.pred.scores_N, kind="stable").tolist():
        if p in match.ignored:
            continue
        role = "tp" if p in ious else "fp"
        by_role[role].append(
            GalleryBox(
                role,
                image.pred.descs[p],
                _edges(image.pred.boxes_N4[p], extent),
                float(image.pred.scores_N[p]),
                ious.get(p),
                thinned(outlines.of_pred(image, p), most_points),
            )
        )
    boxes = [box for of_role in by_role.values() for box in of_role[:most_boxes]]
    return boxes, sum(map(len, by_role.values())) - len(boxes)


def _edges(box_4: np.ndarray, extent: float) -> list[float]:
    x1, y1, x2, y2 = box_4.tolist()
    return [x1, y1, x2 + extent, y2 + extent]


def _tags(shown: Sequence[int], tagged: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """The numbers of the lists that each image is in."""
    tags_of: dict[int, list[int]] = {index: [] for index in shown}
    for tag, rows in enumerate(tagged):
        for row in rows:
            if row in tags_of:
                tags_of[row].append(tag)
    return tags_of


def _path(numbers: RunNumbers, index: int) -> Path | None:
    name = numbers.images[index].file_name
    return numbers.run.image_root / name if name else None


def _card(
    runs: Sequence[RunNumbers],
    outlines: Sequence[RunOutlines],
    index: int,
    picture: str | None,
    tags: Sequence[int],
    full: bool,
) -> GalleryCard:
    image = runs[-1].images[index]
    matches = [numbers.matches[index] for numbers in runs]
    counts = matches[-1].counts
    return GalleryCard(
        title=image.file_name or f"image {image.image_id}",
        width=image.width,
        height=image.height,
        picture=picture,
        panels=[_panel(numbers, of_run, index, full) for numbers, of_run in zip(runs, outlines, strict=True)],
        tags=tags,
        values={
            "f1": round(matches[-1].scores.f1, 6),
            "errors": counts.fp + counts.fn,
            "iou": round(matches[-1].mean_iou, 6),
            "objects": int((~image.gt.crowd_N).sum()),
            "change": round(matches[-1].scores.f1 - matches[0].scores.f1, 6),
        },
    )


def _panel(numbers: RunNumbers, outlines: RunOutlines, index: int, full: bool) -> Panel:
    image, match = numbers.images[index], numbers.matches[index]
    boxes, hidden = drawn_boxes(image, match, outlines, numbers.run.box_extent, full=full)
    trace = numbers.run.traces.get(image.image_id)
    text = None if trace is None or not full else trace.text
    if text is not None and len(text) > MAX_TEXT:
        text = f"{text[:MAX_TEXT]} … ({len(text) - MAX_TEXT} more characters)"
    dropped = ", ".join(f"{reason.replace('_', ' ')}: {count}" for reason, count in image.errors.items())
    tp, fp, fn = match.counts
    return Panel(boxes, (tp, fp, fn), hidden, text, f"dropped: {dropped}" if dropped else "")


def _badness(match: ImageMatch) -> tuple[float, int, float]:
    return match.scores.f1, -(match.counts.fp + match.counts.fn), match.mean_iou
