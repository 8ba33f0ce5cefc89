"""The demo page's pictures: ground truth beside predictions, with what the model wrote."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from coordexp.eval.box_matching import BoxSet
from coordexp.eval.detection import ImageMatch, match_boxes
from coordexp.eval.predictions.image_result import ImageResult, Objects
from coordexp.eval.predictions.scored import load_scored_run
from coordexp.eval.report.demo_page import GalleryItem
from coordexp.eval.report.pictures import XYXY, contact_sheet, side_by_side
from coordexp.pictures import open_picture


def gallery(run: Path, data: Path, output: Path, count: int) -> list[GalleryItem]:
    """Draw the first `count` images of an evaluated run into `output`; returns entries for the demo page.

    Also writes `output/contact_sheet.png`.
    """
    output.mkdir(parents=True, exist_ok=True)
    found = load_scored_run(run)
    images = found.images[:count]
    entries: list[GalleryItem] = []
    pictures = []
    for image, match in zip(images, match_boxes(BoxSet.of(images)).matches(0.5), strict=True):
        pictures.append(_picture(image, match, data))
        path = output / f"{Path(image.file_name).stem}.png"
        pictures[-1].save(path)
        entries.append(
            {
                "title": image.file_name,
                "picture": path,
                "text": found.traces[image.image_id].text or "",
                "status": _status(image),
                "ok": not image.errors,
            }
        )
    contact_sheet(pictures).save(output / "contact_sheet.png")
    return entries


def _picture(image: ImageResult, match: ImageMatch, data: Path) -> Image.Image:
    picture = open_picture(data / image.file_name)
    pairs = [(p, g) for p, g, _ in match.pairs]
    return side_by_side(picture, _boxes(image.gt), _boxes(image.pred), pairs)


def _boxes(objects: Objects) -> list[tuple[str, XYXY]]:
    return list(zip(objects.descs, objects.boxes_N4.tolist(), strict=True))


def _status(image: ImageResult) -> str:
    dropped = ", ".join(f"{reason}: {count}" for reason, count in image.errors.items())
    count = len(image.pred)
    return f"parsed, {count} object{'' if count == 1 else 's'}" + (f" ({dropped})" if dropped else "")
