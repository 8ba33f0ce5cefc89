"""Plain COCO files of any detector: ground truth (instances) and results (detections), read once and named in errors.

dataset = load_dataset(Path("instances.json"))
results = load_results(Path("results.json"), dataset, dataset_path=Path("instances.json"))
lines = coco_lines(dataset, results)       # the form of `gt_vs_pred_scored.jsonl`, for tables and galleries
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coordexp.codec.schema import KIND_BBOX
from coordexp.errors import RecordError
from coordexp.eval.coco.annotations import Dataset, Results, read_dataset, read_results
from coordexp.eval.predictions.artifacts import COORD_MODE
from coordexp.files import read_json
from coordexp.geometry import xywh_to_xyxy


def load_dataset(path: Path) -> Dataset:
    """The COCO data set in a file; RecordError naming file, entry and key for what cannot be read as one."""
    return read_dataset(load_json(path), prefix=f"{path}: ")


def load_results(path: Path, dataset: Dataset, *, dataset_path: Path, iou_type: str = "bbox") -> Results:
    """The COCO results list in a file.

    Raises RecordError naming file, entry and key, and `dataset_path` for results of images that it does not hold.
    """
    of = f" of {dataset_path}"
    return read_results(load_json(path), dataset, iou_type=iou_type, prefix=f"{path}: ", of=of)


def load_json(path: Path) -> Any:
    """The JSON value in a file of annotations. NaN and infinite numbers pass, for the checks to name their entry.

    Raises RecordError naming file and line when it is no JSON, and saying so when it is JSON Lines.
    """
    try:
        return read_json(path, allow_nan=True)
    except RecordError as error:
        if _is_json_lines(path):
            raise RecordError(
                f"{path}: is JSON Lines (one value per line), expected one JSON value. Put the lines into one list, "
                "separated by commas, or give the file that was exported as JSON."
            ) from error
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file in front of a RecordError raised inside."""
    try:
        yield
    except RecordError as error:
        raise RecordError(f"{path}: {error}") from None


def coco_lines(dataset: Dataset, results: Results) -> list[dict[str, Any]]:
    """One line per image as in `gt_vs_pred_scored.jsonl`; a crowd region has `"crowd": true`.

    Objects are boxes: a result without `bbox` has the box around its mask.
    """
    lines: list[dict[str, Any]] = [
        {
            "image_id": image_id,
            "image": file_name,
            "width": int(width) or None,
            "height": int(height) or None,
            "coord_mode": COORD_MODE,
            "gt": [],
            "pred": [],
        }
        for image_id, file_name, (width, height) in zip(
            dataset.image_ids, dataset.file_names, dataset.sizes_N2.tolist(), strict=True
        )
    ]
    names = dataset.category_names
    truths = zip(
        dataset.image_M.tolist(),
        dataset.category_M.tolist(),
        xywh_to_xyxy(dataset.boxes_xywh_M4).tolist(),
        dataset.crowd_M.tolist(),
        strict=True,
    )
    for image, category, points, crowd in truths:
        truth = {"type": KIND_BBOX, "points": points, "desc": names[category]}
        lines[image]["gt"].append({**truth, "crowd": True} if crowd else truth)
    found = zip(
        results.image_M.tolist(),
        results.category_M.tolist(),
        xywh_to_xyxy(results.boxes_xywh_M4).tolist(),
        results.score_M.tolist(),
        strict=True,
    )
    for image, category, points, score in found:
        lines[image]["pred"].append(
            {"type": KIND_BBOX, "points": points, "desc": names[category], "score": score}
        )
    return lines


def _is_json_lines(path: Path) -> bool:
    """Whether the first two lines that hold anything are a JSON value each."""
    try:
        with path.open("rb") as stream:
            head = stream.read(1 << 20).decode("utf-8-sig", errors="replace")
    except OSError:
        return False
    lines = [line for line in head.split("\n") if line.strip()][:2]
    return len(lines) == 2 and all(map(_is_json_object, lines))


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), (dict, list))
    except (ValueError, RecursionError):
        return False
