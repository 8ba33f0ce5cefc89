"""Plain COCO files of any detector: ground truth (instances) and results (detections), read once and named in errors.

dataset = load_dataset(Path("instances.json"))
results = load_results(Path("results.json"), dataset, dataset_path=Path("instances.json"))
images = coco_images(dataset, results)     # what F1, tables and galleries are made from
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from coordexp.errors import RecordError
from coordexp.eval.coco.annotations import Dataset, Results, read_dataset, read_results
from coordexp.eval.predictions.image_result import ImageResult, Objects
from coordexp.files import read_json
from coordexp.geometry import IntArray, xywh_to_xyxy


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
        with _without_garbage_collection():
            return read_json(path, allow_nan=True)
    except RecordError as error:
        if _is_json_lines(path):
            raise RecordError(
                f"{path}: is JSON Lines (one value per line), expected one JSON value. Put the lines into one list, "
                "separated by commas, or give the file that was exported as JSON."
            ) from error
        raise


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Millions of new lists make the collector look at all of them again and again: two thirds of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file in front of a RecordError raised inside."""
    try:
        yield
    except RecordError as error:
        raise RecordError(f"{path}: {error}") from None


def coco_images(dataset: Dataset, results: Results) -> list[ImageResult]:
    """One image after the other, in the order of the data set.

    Objects are boxes: a result without `bbox` has the box around its mask.
    """
    gt_rows, pred_rows = (_rows_by_image(side.image_M, len(dataset.image_ids)) for side in (dataset, results))
    gt_boxes, pred_boxes = (xywh_to_xyxy(side.boxes_xywh_M4) for side in (dataset, results))
    names = dataset.category_names
    return [
        ImageResult(
            image_id=image_id,
            file_name=file_name,
            width=width,
            height=height,
            gt=Objects.of(
                [names[row] for row in dataset.category_M[gt].tolist()],
                gt_boxes[gt].tolist(),
                crowd=dataset.crowd_M[gt],
                areas=dataset.area_M[gt],
            ),
            pred=Objects.of(
                [names[row] for row in results.category_M[pred].tolist()],
                pred_boxes[pred].tolist(),
                scores=results.score_M[pred],
            ),
        )
        for image_id, file_name, (width, height), gt, pred in zip(
            dataset.image_ids, dataset.file_names, dataset.sizes_N2.tolist(), gt_rows, pred_rows, strict=True
        )
    ]


def _rows_by_image(image_M: IntArray, num_images: int) -> list[IntArray]:
    """The rows of each image, in their order."""
    order = np.argsort(image_M, kind="stable")
    return np.split(order, np.cumsum(np.bincount(image_M, minlength=num_images))[:-1])


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
