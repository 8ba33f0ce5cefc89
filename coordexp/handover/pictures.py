"""Pictures for a card: ground truth beside the answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coordexp.eval.box_matching import BoxSet
from coordexp.eval.detection import match_boxes
from coordexp.eval.predictions.image_result import Objects
from coordexp.eval.report.data import load_run
from coordexp.eval.report.pictures import XYXY, side_by_side
from coordexp.files import atomic_file
from coordexp.handover.facts import CardEvaluation
from coordexp.pictures import open_picture

FOLDER = "pictures"
SHOWN_IOU = 0.5
"""From here on a prediction is drawn as matched."""


def draw_answers(evaluations: Sequence[CardEvaluation], folder: Path, number: int) -> tuple[str, ...]:
    """Draw the first `number` images of each evaluation into `folder/pictures`; their paths relative to `folder`.

    Raises RecordError for an evaluation whose files or pictures cannot be read.
    """
    drawn: list[str] = []
    for at, evaluation in enumerate(evaluations if number else ()):
        run = load_run(evaluation.folder)
        matches = match_boxes(BoxSet.of(run.images)).matches(SHOWN_IOU)
        for place, (image, match) in enumerate(list(zip(run.images, matches, strict=True))[:number]):
            pairs = [(p, g) for p, g, _ in match.pairs]
            picture = side_by_side(
                open_picture(run.image_root / image.file_name), _boxes(image.gt), _boxes(image.pred), pairs
            )
            name = f"{FOLDER}/answer_{at}_{place}.png"
            with atomic_file(folder / name, "wb") as stream:
                picture.save(stream, format="PNG")
            drawn.append(name)
    return tuple(drawn)


def _boxes(objects: Objects) -> list[tuple[str, XYXY]]:
    return list(zip(objects.descs, objects.boxes_N4.tolist(), strict=True))
