"""Reading the scored file of an inference run, and refusing one that cannot be evaluated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coordexp.errors import RecordError
from coordexp.eval.predictions.artifacts import (
    GT_VS_PRED,
    RUN_META,
    SCORED,
    TOKEN_TRACE,
    check_pixels,
    read_jsonl_lines,
)
from coordexp.files import read_json

_LINE_KEYS = ("image_id", "image", "width", "height", "coord_mode", "gt", "pred")
_IMAGE_KEYS = ("image", "width", "height")


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


def read_scored(path: Path) -> list[dict[str, Any]]:
    """Lines of a scored file, checked.

    Raises RecordError naming file, line and object: an unscored file (with the command that scores it), a score
    that is no finite number, malformed points, an image that stands there twice.
    """
    lines = read_jsonl_lines(path, _LINE_KEYS)
    seen: dict[tuple[str, object], int] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        if "pred_score_source" not in line:
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
        _check_objects(line, where)
        for index, obj in enumerate(line["pred"]):
            score = obj.get("score")
            if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
                raise RecordError(
                    f"{where}: pred[{index}] has score {score!r}; expected a finite number. Score the run again "
                    f"(`coordexp score --run {path.parent}`)."
                )
    return lines


def check_same_run(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """RecordError unless a scored file was made from the predictions and the token trace beside it, if any."""
    beside = path.parent / GT_VS_PRED
    if beside.is_file() and beside != path:
        unscored = read_jsonl_lines(beside, _LINE_KEYS)
        check_same_images(lines, path, unscored, beside)
        by_id = {line["image_id"]: line for line in unscored}
        for line in lines:
            _check_predictions(line, by_id[line["image_id"]], path, beside)
    trace = path.parent / TOKEN_TRACE
    if trace.is_file():
        _check_ids(lines, path, read_jsonl_lines(trace, ("image_id",)), trace)


def check_same_images(
    lines: Sequence[dict[str, Any]], path: Path, others: Sequence[dict[str, Any]], other_path: Path
) -> None:
    """RecordError unless both files hold the same images with the same size and ground truth, in any order."""
    _check_ids(lines, path, others, other_path)
    by_id = {line["image_id"]: line for line in others}
    for line in lines:
        other = by_id[line["image_id"]]
        mine, theirs = ([found.get(key) for key in _IMAGE_KEYS] for found in (line, other))
        if mine != theirs:
            raise RecordError(
                f"{path} and {other_path} are of different data: image_id {line['image_id']} is "
                f"{mine[0]} ({mine[1]} x {mine[2]}) in one, {theirs[0]} ({theirs[1]} x {theirs[2]}) in the other."
            )
        if _truths(line) != _truths(other):
            raise RecordError(
                f"{path} and {other_path} are of different data: image_id {line['image_id']} ({line['image']}) has "
                f"{len(line['gt'])} and {len(other['gt'])} ground-truth objects that are not the same."
            )


def rollout_seconds(lines: Sequence[dict[str, Any]], path: Path) -> float | None:
    """Seconds the predictions of a scored file took to generate; None where no token trace says so."""
    trace = path.parent / TOKEN_TRACE
    if not trace.is_file():
        return None
    ids = {line["image_id"] for line in lines}
    found = [entry for entry in read_jsonl_lines(trace, ("image_id",)) if entry["image_id"] in ids]
    seconds = [entry["seconds"] for entry in found if entry.get("seconds") is not None]
    return float(sum(seconds)) if seconds and len(seconds) == len(found) else None


def recorded_image_root(run: Path) -> Path | None:
    """The folder that image names start from, as the inference run recorded it; None where that is not there."""
    meta = (run if run.is_dir() else run.parent) / RUN_META
    if not meta.is_file():
        return None
    root = Path(read_json(meta)["data"]).parent
    return root if root.is_dir() else None


def _check_ids(
    lines: Sequence[dict[str, Any]], path: Path, others: Sequence[dict[str, Any]], other_path: Path
) -> None:
    mine, theirs = {line["image_id"] for line in lines}, {line["image_id"] for line in others}
    only = sorted(mine ^ theirs, key=str)
    if only:
        holder = path if only[0] in mine else other_path
        raise RecordError(
            f"{path} and {other_path} are not of the same images: {len(mine)} and {len(theirs)} images; image_id "
            f"{only[0]} is in {holder} only (of {len(only)} such)."
        )


def _check_predictions(
    line: dict[str, Any], unscored: dict[str, Any], path: Path, unscored_path: Path
) -> None:
    """Scoring may leave predictions out, but adds and moves none."""
    left = iter((obj.get("desc"), obj.get("points")) for obj in unscored["pred"])
    for index, obj in enumerate(line["pred"]):
        if (obj["desc"], obj["points"]) not in left:
            raise RecordError(
                f"{path}: image_id {line['image_id']}: pred[{index}] ({obj['desc']!r}) is not in {unscored_path}: the "
                f"scores are of another run. Score this one again: `coordexp score --run {path.parent}`."
            )


def _truths(line: dict[str, Any]) -> list[tuple[str, list[float]]]:
    return sorted((obj["desc"], [round(value, 2) for value in obj["points"]]) for obj in line["gt"])


def _check_objects(line: dict[str, Any], where: str) -> None:
    for side in ("gt", "pred"):
        for index, obj in enumerate(line[side]):
            missing = [key for key in ("desc", "points") if key not in obj]
            if missing:
                raise RecordError(f"{where}: {side}[{index}] lacks {', '.join(missing)}.")
            fault = _points_fault(obj["points"])
            if fault:
                raise RecordError(
                    f"{where}: {side}[{index}] ({obj['desc']!r}) has points {obj['points']}: {fault}."
                )


def _points_fault(points: Any) -> str | None:
    if not isinstance(points, list) or not (len(points) == 4 or (len(points) >= 6 and len(points) % 2 == 0)):
        return "expected 4 values (a box) or an even count of at least 6 (a polygon)"
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in points):
        return "expected finite numbers"
    if len(points) == 4 and (points[2] < points[0] or points[3] < points[1]):
        return "expected x1, y1, x2, y2 with x1 <= x2 and y1 <= y2"
    return None
