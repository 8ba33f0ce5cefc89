"""The demo page's pictures: ground truth beside the answers of one or two models, with what they wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from coordexp.eval.box_matching import BoxSet
from coordexp.eval.detection import ImageMatch, match_boxes
from coordexp.eval.predictions.image_result import ImageResult, Objects
from coordexp.eval.predictions.scored import load_scored_run
from coordexp.eval.report.demo_page import GalleryItem
from coordexp.eval.report.pictures import XYXY, AnswerPanel, compared, contact_sheet
from coordexp.pictures import open_picture

SHOWN_IOU = 0.75
"""From here on a prediction is drawn as matched."""


@dataclass(frozen=True)
class _Answered:
    """The answer of one model to one image."""

    name: str
    image: ImageResult
    match: ImageMatch
    text: str


def gallery(runs: Mapping[str, Path], data: Path, output: Path, count: int) -> list[GalleryItem]:
    """Draw `count` images of evaluated runs into `output`; returns entries for the demo page.

    Those come first in which the runs differ most in F1 at an IoU of 0.75, whichever is better; of equal ones, and of
    one run, the first of the file. Also writes `output/contact_sheet.png`.

    runs: name -> folder, all of the same images.
    """
    output.mkdir(parents=True, exist_ok=True)
    rows = list(zip(*(_answers(name, run) for name, run in runs.items()), strict=True))
    rows.sort(key=_difference, reverse=True)  # a stable sort: equal ones stay in the order of the file
    entries: list[GalleryItem] = []
    pictures = []
    for row in rows[:count]:
        image = row[0].image
        pictures.append(_picture(row, data))
        path = output / f"{Path(image.file_name).stem}.png"
        pictures[-1].save(path)
        entries.append(
            {
                "title": image.file_name,
                "picture": path,
                "text": "\n".join(_said(one, alone=len(row) == 1) for one in row),
                "status": "; ".join(_status(one, alone=len(row) == 1) for one in row),
                "ok": not any(one.image.errors for one in row),
            }
        )
    contact_sheet(pictures).save(output / "contact_sheet.png")
    return entries


def _answers(name: str, run: Path) -> list[_Answered]:
    found = load_scored_run(run)
    matches = match_boxes(BoxSet.of(found.images)).matches(SHOWN_IOU)
    return [
        _Answered(name, image, match, found.traces[image.image_id].text or "")
        for image, match in zip(found.images, matches, strict=True)
    ]


def _difference(row: tuple[_Answered, ...]) -> float:
    f1 = [one.match.scores.f1 for one in row]
    return max(f1) - min(f1)


def _picture(row: tuple[_Answered, ...], data: Path) -> Image.Image:
    image = row[0].image
    answers = [
        AnswerPanel(
            "prediction" if len(row) == 1 else one.name,
            _boxes(one.image.pred),
            [(p, g) for p, g, _ in one.match.pairs],
        )
        for one in row
    ]
    return compared(open_picture(data / image.file_name), _boxes(image.gt), answers)


def _boxes(objects: Objects) -> list[tuple[str, XYXY]]:
    return list(zip(objects.descs, objects.boxes_N4.tolist(), strict=True))


def _said(one: _Answered, *, alone: bool) -> str:
    return one.text if alone else f"{one.name}: {one.text}"


def _status(one: _Answered, *, alone: bool) -> str:
    dropped = ", ".join(f"{reason}: {count}" for reason, count in one.image.errors.items())
    count = len(one.image.pred)
    said = f"parsed, {count} object{'' if count == 1 else 's'}" + (f" ({dropped})" if dropped else "")
    return said if alone else f"{one.name}: {said}"
