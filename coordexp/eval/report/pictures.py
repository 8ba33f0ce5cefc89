"""Pictures of detections and of a run: ground truth beside prediction, contact sheets, metric curves.

Colours are from the Okabe-Ito palette, which readers with any colour vision can tell apart; a missed object
is dashed as well. Boxes are pixel xyxy whose x2, y2 name the last pixel that belongs to the object (the frame
of `coordexp.geometry`), so an outline runs around whole pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from coordexp.errors import ContractError
from coordexp.metrics.catalog import EVAL_PREFIX
from coordexp.metrics.keys_run import LOSS
from coordexp.metrics.keys_stage1 import (
    BASE_CE_LOSS,
    COORD_DIAG_EXPECTED_BIN_ABS_ERR_P90,
    COORD_DIAG_EXPECTED_BIN_MAE,
    COORD_DIAG_LOSS,
)

PANEL_SIDE = 320
"""Smaller images are enlarged by a whole factor until their longer side reaches this, in pixels."""
MAX_PANEL_SIDE = 960
"""Larger images are reduced to this."""

_HEADER_HEIGHT, _LEGEND_HEIGHT, _GAP, _FONT_SIZE = 26, 26, 8, 13
_INK, _PAPER = "#1a1a1a", "#ffffff"

XYXY = Sequence[float]


class Role(StrEnum):
    """What a drawn box stands for."""

    GT = "ground truth"
    FN = "missed"
    TP = "matched prediction"
    FP = "false positive"


ROLE_COLORS = {Role.GT: "#009E73", Role.FN: "#CC79A7", Role.TP: "#0072B2", Role.FP: "#D55E00"}


CLASS_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
"""Where colours tell classes apart."""
_LIGHT_COLORS = ("#CC79A7", "#E69F00", "#56B4E9", "#F0E442")  # dark letters on them


class DrawnBox(NamedTuple):
    """A box with its label, in a colour. box_xyxy: pixels, last pixel included."""

    box_xyxy: XYXY
    label: str
    color: str
    dashed: bool = False

    @property
    def ink(self) -> str:
        """Of the label's letters."""
        return _INK if self.color in _LIGHT_COLORS else _PAPER


@dataclass(frozen=True)
class LabeledBox:
    """A box to draw. box_xyxy: pixels, last pixel included."""

    box_xyxy: XYXY
    label: str
    role: Role

    @property
    def drawn(self) -> DrawnBox:
        """In the colour of its role."""
        return DrawnBox(self.box_xyxy, self.label, ROLE_COLORS[self.role], dashed=self.role is Role.FN)


class Curve(NamedTuple):
    """One figure: which metric keys it shows, and how its axes read."""

    name: str
    title: str
    ylabel: str
    keys: tuple[str, ...]


TRAINING_CURVES = (
    Curve("loss", "Loss", "loss (weighted terms)", (LOSS, BASE_CE_LOSS, COORD_DIAG_LOSS)),
    Curve(
        "coord_error",
        "Coordinate error",
        "error (bins of 1000)",
        (COORD_DIAG_EXPECTED_BIN_MAE, COORD_DIAG_EXPECTED_BIN_ABS_ERR_P90),
    ),
)


class AnswerPanel(NamedTuple):
    """What one model says of an image.

    boxes: (desc, pixel box xyxy) of every prediction.
    matched: (prediction, ground truth) index pairs; all other predictions are false.
    """

    title: str
    boxes: Sequence[tuple[str, XYXY]]
    matched: Sequence[tuple[int, int]]


def side_by_side(
    image: Image.Image,
    gt: Sequence[tuple[str, XYXY]],
    pred: Sequence[tuple[str, XYXY]],
    matched: Sequence[tuple[int, int]],
) -> Image.Image:
    """Ground truth on the left, prediction on the right, a legend below; arguments as those of `AnswerPanel`."""
    return compared(image, gt, [AnswerPanel("prediction", pred, matched)])


def compared(
    image: Image.Image, gt: Sequence[tuple[str, XYXY]], answers: Sequence[AnswerPanel]
) -> Image.Image:
    """Ground truth on the left, then one panel for each answer, a legend below.

    gt: (desc, pixel box xyxy) of every object; one that no answer matches is drawn as missed.
    """
    found = {g for answer in answers for _, g in answer.matched}
    roles = [Role.GT if g in found else Role.FN for g in range(len(gt))]
    gt_boxes = [LabeledBox(box, desc, role) for role, (desc, box) in zip(roles, gt, strict=True)]
    panels = [(f"ground truth: {len(gt)}", draw_boxes(image, gt_boxes))]
    for answer in answers:
        right = {p for p, _ in answer.matched}
        boxes = [
            LabeledBox(box, desc, Role.TP if p in right else Role.FP)
            for p, (desc, box) in enumerate(answer.boxes)
        ]
        header = f"{answer.title}: {len(boxes)}, matched: {len(right)}"
        panels.append((header, draw_boxes(image, boxes)))
    width, height = panels[0][1].size
    canvas_width = len(panels) * (width + _GAP) - _GAP
    canvas = Image.new("RGB", (canvas_width, _HEADER_HEIGHT + height + _LEGEND_HEIGHT), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, (header, panel) in enumerate(panels):
        left = column * (width + _GAP)
        draw.text((left + 4, 4), header, fill=_INK, font=_font())
        canvas.paste(panel, (left, _HEADER_HEIGHT))
    _draw_legend(draw, canvas.width, _HEADER_HEIGHT + height)
    return canvas


def draw_boxes(image: Image.Image, boxes: Sequence[LabeledBox]) -> Image.Image:
    """A copy of the image, enlarged or reduced for viewing, with outlines and labels."""
    return draw_colored(image, [box.drawn for box in boxes])


def draw_colored(
    image: Image.Image, boxes: Sequence[DrawnBox], *, max_side: int | None = MAX_PANEL_SIDE
) -> Image.Image:
    """As `draw_boxes`, in colours of the caller's choice. max_side: larger images are reduced to it; None: none is."""
    panel, scale = _scaled(image, max_side)
    draw = ImageDraw.Draw(panel)
    outlines = [_outline(box.box_xyxy, scale, panel.size) for box in boxes]
    for box, outline in zip(boxes, outlines, strict=True):
        _draw_outline(draw, outline, box.color, dashed=box.dashed)
    taken: list[XYXY] = []
    for box, outline in zip(boxes, outlines, strict=True):
        taken.append(_draw_label(draw, panel.size, outline, box, taken))
    return panel


def contact_sheet(pictures: Sequence[Image.Image], *, columns: int = 2) -> Image.Image:
    """Pictures in a grid, row by row, each centred in its cell.

    Raises:
        ContractError: there is no picture, or no column.
    """
    if not pictures or columns < 1:
        raise ContractError(
            f"contact sheet of {len(pictures)} pictures in {columns} columns: expected 1 or more of each"
        )
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    cell_width = max(picture.width for picture in pictures) + 2 * _GAP
    cell_height = max(picture.height for picture in pictures) + 2 * _GAP
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), _PAPER)
    for index, picture in enumerate(pictures):
        left = index % columns * cell_width + (cell_width - picture.width) // 2
        top = index // columns * cell_height + (cell_height - picture.height) // 2
        sheet.paste(picture, (left, top))
    return sheet


def plot_curves(
    payloads: Sequence[Mapping[str, Any]], output_dir: Path, *, curves: Sequence[Curve] = TRAINING_CURVES
) -> list[Path]:
    """Write `<name>.png` for every curve that has data, and return the paths in order.

    Training numbers are lines; evaluation numbers (keys with the `eval_` prefix) are dashed with markers.

    Args:
        payloads: metric payloads, each with `mode`, `global_step` and `metrics`.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    paths = []
    for curve in curves:
        series = [
            (key, prefix, points)
            for key in curve.keys
            for prefix in ("", EVAL_PREFIX)
            if (points := _points(payloads, prefix + key))
        ]
        if series:
            paths.append(output_dir / f"{curve.name}.png")
            _write_figure(curve, series, paths[-1])
    return paths


def _points(payloads: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(global step, value) where the key is present, by step; the last payload of a step counts."""
    by_step = {p["global_step"]: float(p["metrics"][key]) for p in payloads if key in p["metrics"]}
    return sorted(by_step.items())


def _write_figure(
    curve: Curve, series: Sequence[tuple[str, str, list[tuple[int, float]]]], path: Path
) -> None:
    figure = Figure(figsize=(6.4, 4.0), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    color_of = dict(zip(curve.keys, ("#0072B2", "#E69F00", "#009E73", "#CC79A7"), strict=False))
    for key, prefix, points in series:
        steps, values = zip(*points, strict=True)
        style = {"linestyle": "--", "marker": "o", "markersize": 4} if prefix else {"linewidth": 1.6}
        axes.plot(steps, values, color=color_of.get(key, _INK), label=f"{prefix}{key}", **style)
    axes.set(title=curve.title, xlabel="optimizer step", ylabel=curve.ylabel)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Software": None})


def _scaled(image: Image.Image, max_side: int | None) -> tuple[Image.Image, float]:
    """An RGB copy for viewing and its scale: whole factors up (nearest neighbour), any factor down."""
    longer = max(image.size)
    image = image.convert("RGB")
    if max_side is not None and longer > max_side:
        scale = max_side / longer
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        return image.resize(size, Image.Resampling.LANCZOS), scale
    factor = math.ceil(PANEL_SIDE / longer)
    size = (image.width * factor, image.height * factor)
    return image.resize(size, Image.Resampling.NEAREST), float(factor)


def _outline(box_xyxy: XYXY, scale: float, size: tuple[int, int]) -> XYXY:
    """First and last picture pixel of the box, inside the picture.

    Image pixel i covers picture pixels i * scale to (i + 1) * scale - 1.
    """
    x1, y1, x2, y2 = box_xyxy
    corners = (x1 * scale, y1 * scale, (x2 + 1) * scale - 1, (y2 + 1) * scale - 1)
    left, top, right, bottom = (min(max(0.0, v), size[i % 2] - 1.0) for i, v in enumerate(corners))
    return left, top, max(left, right), max(top, bottom)


def _draw_outline(draw: ImageDraw.ImageDraw, outline: XYXY, color: str, *, dashed: bool) -> None:
    """Two pixels of colour inside one pixel of white, so that it shows on any picture."""
    x1, y1, x2, y2 = outline
    draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=_PAPER)
    if not dashed:
        draw.rectangle((x1, y1, x2, y2), outline=color, width=2)
        return
    for start in range(int(x1), int(x2), 10):
        for y in (y1, y2 - 1):
            draw.line((start, y, min(start + 5, x2), y), fill=color, width=2)
    for start in range(int(y1), int(y2), 10):
        for x in (x1, x2 - 1):
            draw.line((x, start, x, min(start + 5, y2)), fill=color, width=2)


def _draw_label(
    draw: ImageDraw.ImageDraw, size: tuple[int, int], outline: XYXY, box: DrawnBox, taken: Sequence[XYXY]
) -> XYXY:
    """Write the label on its colour above, below or inside the box, off other labels if it can be."""
    text_width, text_height = draw.textlength(box.label, font=_font()) + 6, _FONT_SIZE + 5
    x1, y1, _, y2 = outline
    left = min(max(0.0, x1), max(0.0, size[0] - text_width))
    tops = [
        t for t in (y1 - text_height - 1, y2 + 2, y1 + 2, y2 - text_height) if 0 <= t <= size[1] - text_height
    ]
    places = [(left, top, left + text_width, top + text_height) for top in tops or [0.0]]
    place = next((p for p in places if not any(_overlap(p, other) for other in taken)), places[0])
    draw.rectangle(place, fill=box.color)
    draw.text((place[0] + 3, place[1] + 1), box.label, fill=box.ink, font=_font())
    return place


def _overlap(a: XYXY, b: XYXY) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _draw_legend(draw: ImageDraw.ImageDraw, width: int, top: int) -> None:
    """All four roles in a row, as far as they fit."""
    left = 4.0
    for role, color in ROLE_COLORS.items():
        text_width = draw.textlength(role.value, font=_font())
        if left + 18 + text_width > width:
            return
        _draw_outline(draw, (left, top + 8, left + 12, top + 20), color, dashed=role is Role.FN)
        draw.text((left + 18, top + 5), role.value, fill=_INK, font=_font())
        left += text_width + 34


@cache
def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans as shipped with matplotlib: Latin, Greek, Cyrillic and many symbols."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", _FONT_SIZE)
