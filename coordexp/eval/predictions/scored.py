"""Reading the files of an inference run, and refusing what cannot be evaluated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from coordexp.errors import RecordError
from coordexp.eval.predictions.artifacts import (
    GT_VS_PRED,
    RUN_META,
    SCORED,
    TOKEN_TRACE,
    check_pixels,
    read_jsonl_lines,
)
from coordexp.eval.predictions.checked_classes import CheckedClasses
from coordexp.eval.predictions.image_result import ImageId, ImageResult, Objects
from coordexp.files import read_json

_LINE_KEYS = ("image_id", "image", "width", "height", "coord_mode", "gt", "pred")
_NUMBERS = {int, float}


class AnswerTrace(NamedTuple):
    """What a token trace says of one answer; None where it does not."""

    text: str | None
    num_tokens: int | None
    seconds: float | None
    num_prompt_tokens: int | None = None


@dataclass(frozen=True)
class ScoredRun:
    """The scored predictions of one inference run. traces: by image id, none where the run holds no token trace."""

    path: Path
    images: list[ImageResult]
    traces: dict[ImageId, AnswerTrace]

    @property
    def seconds(self) -> float | None:
        """Seconds the predictions took to generate; None where no token trace says so."""
        seconds = [self.traces[image.image_id].seconds for image in self.images] if self.traces else []
        known = [value for value in seconds if value is not None]
        return float(sum(known)) if known and len(known) == len(seconds) else None


def load_scored_run(run: Path) -> ScoredRun:
    """The scored file of a run folder, or `run` itself when it is a file, with the token trace beside it.

    Raises RecordError for what cannot be evaluated, also where the files in the folder are not of one run.
    """
    path = scored_file(run)
    images = read_predictions(path)
    beside = path.parent / GT_VS_PRED
    if beside.is_file() and beside != path:
        unscored = read_predictions(beside, scored=False)
        check_same_images(images, path, unscored, beside)
        _check_predictions(images, path, unscored, beside)
    trace = path.parent / TOKEN_TRACE
    traces = _read_traces(trace) if trace.is_file() else {}
    if traces:
        _check_ids([image.image_id for image in images], path, list(traces), trace)
    return ScoredRun(path, images, traces)


def scored_file(run: Path) -> Path:
    """The scored file of a run folder, or `run` itself when it is a file.

    Raises RecordError when there is none, naming the command that makes it.
    """
    if not run.is_dir():
        return run
    if (run / SCORED).is_file():
        return run / SCORED
    if (run / GT_VS_PRED).is_file():
        raise RecordError(
            f"{run} holds {GT_VS_PRED} but no {SCORED}: its predictions carry no scores, and average precision is "
            f"meaningless without them. Run `coordexp score --run {run}` first."
        )
    raise RecordError(
        f"{run} holds no {SCORED}: expected the folder of a run after `coordexp infer` and `coordexp score`."
    )


def read_predictions(path: Path, *, scored: bool = True) -> list[ImageResult]:
    """The images of a predictions file, checked.

    Raises RecordError naming file, line and object: malformed points, an image that stands there twice, and unless
    `scored` is False an unscored file (with the command that scores it) or a score that is no finite number.
    """
    images = []
    seen: dict[tuple[str, object], int] = {}
    for number, line in enumerate(read_jsonl_lines(path, _LINE_KEYS), start=1):
        where = f"{path}:{number}"
        if scored and "pred_score_source" not in line:
            raise RecordError(
                f"{where}: predictions carry no scores, and average precision is meaningless without them. "
                f"Run `coordexp score --run {path.parent}` and give its {SCORED}."
            )
        for key in ("image_id", "image"):
            first = seen.setdefault((key, line[key]), number)
            if first != number:
                raise RecordError(
                    f"{where}: {key} {line[key]!r} stands in line {first} already. Every image counts once; remove "
                    "one of the lines (and from the data file, if it lists the image twice)."
                )
        check_pixels(line, where)
        images.append(_image(line, where, scored=scored))
    return images


def check_same_images(
    images: Sequence[ImageResult],
    path: Path,
    others: Sequence[ImageResult],
    other_path: Path,
    *,
    file_names: bool = True,
) -> None:
    """RecordError unless both hold the same images with the same size and ground truth, in any order.

    Boxes may differ by a hundredth of a pixel, which decimals in a file cost.  file_names: False lets those differ.
    """
    _check_ids([image.image_id for image in images], path, [image.image_id for image in others], other_path)
    by_id = {image.image_id: image for image in others}
    for image in images:
        other = by_id[image.image_id]
        mine, theirs = ((found.file_name, found.width, found.height) for found in (image, other))
        if mine[1:] != theirs[1:] or (file_names and mine != theirs):
            raise RecordError(
                f"{path} and {other_path} are of different data: image_id {image.image_id} is "
                f"{mine[0]} ({mine[1]} x {mine[2]}) in one, {theirs[0]} ({theirs[1]} x {theirs[2]}) in the other. "
                "Evaluate both on the same images."
            )
        if not _same_objects(image.gt, other.gt):
            raise RecordError(
                f"{path} and {other_path} are of different data: image_id {image.image_id} ({image.file_name}) has "
                f"{len(image.gt)} and {len(other.gt)} ground-truth objects that are not the same. Evaluate both on "
                "the same data file."
            )


def recorded_image_root(run: Path) -> Path | None:
    """The folder that image names start from, as the inference run recorded it; None where that is not there."""
    meta = (run if run.is_dir() else run.parent) / RUN_META
    if not meta.is_file():
        return None
    root = Path(read_json(meta)["data"]).parent
    return root if root.is_dir() else None


def recorded_decoding(run: Path) -> dict[str, Any] | None:
    """How the answers of an inference run were decoded, as it recorded it; None where it did not."""
    meta = (run if run.is_dir() else run.parent) / RUN_META
    if not meta.is_file():
        return None
    found = {"guided": False, **read_json(meta)["decoding"]}
    return {name: value for name, value in found.items() if value is not None}


def _read_traces(path: Path) -> dict[ImageId, AnswerTrace]:
    return {
        entry["image_id"]: AnswerTrace(
            entry.get("text"),
            len(entry["generated_token_text"]) if "generated_token_text" in entry else None,
            entry.get("seconds"),
            entry.get("num_prompt_tokens"),
        )
        for entry in read_jsonl_lines(path, ("image_id",))
    }


def _image(line: Mapping[str, Any], where: str, *, scored: bool) -> ImageResult:
    gt, pred = line["gt"], line["pred"]
    for side, objects in (("gt", gt), ("pred", pred)):
        _check_objects(objects, side, where)
    if scored:
        _check_scores(pred, where)
    return ImageResult(
        image_id=line["image_id"],
        file_name=line["image"],
        width=line["width"],
        height=line["height"],
        gt=Objects.of(
            [obj["desc"] for obj in gt],
            [obj["points"] for obj in gt],
            crowd=[bool(obj.get("crowd")) for obj in gt],
        ),
        pred=Objects.of(
            [obj["desc"] for obj in pred],
            [obj["points"] for obj in pred],
            scores=[obj["score"] for obj in pred] if scored else None,
        ),
        errors={**(line.get("errors") or {}), **(line.get("pred_score_failures") or {})},
        checked=CheckedClasses.read(line.get("metadata"), f"{where}: metadata"),
    )


def _check_scores(objects: Sequence[Mapping[str, Any]], where: str) -> None:
    scores = [obj.get("score") for obj in objects]
    for index, score in enumerate(scores):
        if type(score) not in _NUMBERS or not math.isfinite(score):  # type: ignore[arg-type]
            raise RecordError(
                f"{where}: pred[{index}] has score {score!r}; expected a finite number. Score the run again "
                "(`coordexp score`)."
            )


def _check_objects(objects: Sequence[Mapping[str, Any]], side: str, where: str) -> None:
    for index, obj in enumerate(objects):
        missing = [key for key in ("desc", "points") if key not in obj]
        if missing:
            raise RecordError(f"{where}: {side}[{index}] lacks {', '.join(missing)}.")
        if not isinstance(obj["desc"], str):
            raise RecordError(f"{where}: {side}[{index}].desc is {obj['desc']!r}; expected text.")
    if _are_boxes([obj["points"] for obj in objects]):
        return
    for index, obj in enumerate(objects):
        fault = _points_fault(obj["points"])
        if fault:
            raise RecordError(
                f"{where}: {side}[{index}] ({obj['desc']!r}) has points {obj['points']}: {fault}."
            )


def _are_boxes(points: Sequence[Any]) -> bool:
    """Whether all are boxes without fault, which nearly all are."""
    if set(map(type, points)) != {list} or set(map(len, points)) != {4}:
        return False
    values = list(chain.from_iterable(points))
    if not set(map(type, values)) <= _NUMBERS or not math.isfinite(sum(values)):
        return False
    return all(x1 <= x2 and y1 <= y2 for x1, y1, x2, y2 in points)


def _points_fault(points: Any) -> str | None:
    if not isinstance(points, list) or not (len(points) == 4 or (len(points) >= 6 and len(points) % 2 == 0)):
        return "expected 4 values (a box) or an even count of at least 6 (a polygon)"
    if not all(type(value) in _NUMBERS and math.isfinite(value) for value in points):
        return "expected finite numbers"
    if len(points) == 4 and (points[2] < points[0] or points[3] < points[1]):
        return "expected x1, y1, x2, y2 with x1 <= x2 and y1 <= y2"
    return None


def _check_ids(mine: Sequence[ImageId], path: Path, theirs: Sequence[ImageId], other_path: Path) -> None:
    only = sorted(set(mine) ^ set(theirs), key=str)
    if only:
        holder = path if only[0] in set(mine) else other_path
        raise RecordError(
            f"{path} and {other_path} are not of the same images: {len(mine)} and {len(theirs)} images; image_id "
            f"{only[0]} is in {holder} only (of {len(only)} such)."
        )


def _check_predictions(
    images: Sequence[ImageResult], path: Path, unscored: Sequence[ImageResult], unscored_path: Path
) -> None:
    """Scoring may leave predictions out, but adds and moves none."""
    by_id = {image.image_id: image.pred for image in unscored}
    for image in images:
        other = by_id[image.image_id]
        left = iter(zip(other.descs, other.points, strict=True))
        for index, prediction in enumerate(zip(image.pred.descs, image.pred.points, strict=True)):
            if prediction not in left:
                raise RecordError(
                    f"{path}: image_id {image.image_id}: pred[{index}] ({prediction[0]!r}) is not in {unscored_path}: "
                    f"the scores are of another run. Score this one again: `coordexp score --run {path.parent}`."
                )


def _same_objects(objects: Objects, others: Objects) -> bool:
    mine, theirs = (
        sorted(zip(side.descs, map(list, side.points), strict=True)) for side in (objects, others)
    )
    if [(desc, len(points)) for desc, points in mine] != [(desc, len(points)) for desc, points in theirs]:
        return False
    pairs = zip(
        chain.from_iterable(p for _, p in mine), chain.from_iterable(p for _, p in theirs), strict=True
    )
    return all(abs(a - b) <= 0.01 for a, b in pairs)
