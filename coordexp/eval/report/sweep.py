"""A decode sweep (`coordexp sweep`) in the report: its table, and with K answers what was seen but not said."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from coordexp.errors import RecordError
from coordexp.eval.gallery.thumbnails import data_uri
from coordexp.eval.predictions.scored import recorded_image_root
from coordexp.eval.report.page import write_page
from coordexp.eval.report.pictures import LabeledBox, Role, draw_boxes
from coordexp.eval.sweep import holds_sweep, oracle_table, read_sweep, way_table
from coordexp.pictures import open_picture

MAX_PICTURES = 24
"""Of images with objects that were seen and not said; the others are in sweep.json."""
_LEVELS = 2  # from the folder of an answer up to that of its sweep


def sweep_section(runs: Sequence[Path], image_root: Path | None = None) -> dict[str, Any] | None:
    """What the template `sweep_section.html.jinja` shows of the sweep that these runs are part of; None without one.

    runs: folders of one report.  image_root: where image names start; None: as the run recorded it.
    """
    for run in runs:
        for folder in [run, *run.resolve().parents[:_LEVELS]]:
            if holds_sweep(folder):
                return _section(folder, image_root)
    return None


def write_sweep(folder: Path, output: Path, image_root: Path | None = None) -> Path:
    """One HTML file about a sweep alone."""
    section = _section(folder, image_root)
    return write_page(output, "sweep_page.html.jinja", title=folder.resolve().name, sweep=section)


def _section(folder: Path, image_root: Path | None) -> dict[str, Any]:
    found = read_sweep(folder)
    oracles = [one | {"pictures": _pictures(one, folder, found, image_root)} for one in found["oracle"]]
    return {
        "num_images": found["num_images"],
        "k": found["k"],
        "ways": way_table(found),
        "recalls": oracle_table(found),
        "oracles": oracles,
        "folder": str(folder),
    }


def _pictures(
    oracle: Mapping[str, Any], folder: Path, sweep: Mapping[str, Any], image_root: Path | None
) -> list[dict[str, Any]]:
    """A card for each of the first images with such objects."""
    greedy = next(way for way in sweep["ways"] if way["name"] == oracle["greedy"])
    root = image_root or recorded_image_root(folder / greedy["folders"][0])
    by_image = groupby(oracle["unsaid"], key=lambda one: str(one["file_name"]))
    cards = []
    for name, objects in [(name, list(group)) for name, group in by_image][:MAX_PICTURES]:
        labels = [f"{one['desc']} ({one['num_found']} of {oracle['k']})" for one in objects]
        boxes = [one["box"] for one in objects]
        cards.append({"name": name, "labels": labels, "picture": _drawn(root, name, labels, boxes)})
    return cards


def _drawn(
    root: Path | None, name: str, labels: Sequence[str], boxes: Sequence[Sequence[float]]
) -> str | None:
    """The picture with its objects; None where it cannot be read."""
    if root is None:
        return None
    try:
        picture = open_picture(root / name)
    except RecordError:
        return None
    drawn = draw_boxes(
        picture, [LabeledBox(box, label, Role.FN) for box, label in zip(boxes, labels, strict=True)]
    )
    stream = io.BytesIO()
    drawn.convert("RGB").save(stream, "JPEG", quality=80)
    return data_uri(stream.getvalue(), "image/jpeg")
