"""What a report is made from: the images of evaluated runs, with ground truth, predictions and, where known, the text.

A run is a folder in one of two layouts:

- of `coordexp infer`, `score` and (not needed) `eval`: `gt_vs_pred_scored.jsonl`, beside it the token trace;
- of `coordexp eval --format coco`: `coco_gt.json` and `coco_preds.json`.

Everything the report shows is computed from these files, by the same code as `coordexp eval`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from coordexp.errors import RecordError
from coordexp.eval.coco.fields import id_order
from coordexp.eval.evaluate import COCO_GT, COCO_PREDS, DESC_MAPPING, ScoredSet, from_coco_files
from coordexp.eval.predictions.artifacts import RUN_META, SCORED
from coordexp.eval.predictions.image_result import ImageId, ImageResult
from coordexp.eval.predictions.scored import AnswerTrace, check_same_images, load_scored_run
from coordexp.files import read_json


@dataclass(frozen=True, eq=False)
class ReportRun:
    """One run, images by ascending id.

    desc_map: categories of descriptions that are none, as `coordexp eval` mapped them; None where it has not run.
    traces: what the model wrote, by image id.  image_root: where file names start.
    box_extent: 1 where x2, y2 name the last pixel of an object, 0 where they are its far edge (COCO); for drawing.
    """

    directory: Path
    detections: ScoredSet
    desc_map: Mapping[str, str] | None
    traces: Mapping[ImageId, AnswerTrace]
    image_root: Path
    box_extent: float

    @property
    def name(self) -> str:
        """What the report calls it."""
        return self.detections.name

    @property
    def images(self) -> Sequence[ImageResult]:
        """Descriptions as they are in the files."""
        return self.detections.images


def load_runs(directories: Sequence[Path], image_root: Path | None = None) -> list[ReportRun]:
    """The runs in order, which must be of the same images with the same ground truth.

    image_root: None takes the folder of the data file that `coordexp infer` recorded, else the run's own folder.
    Raises RecordError for a folder of neither layout, for broken files, and for runs that cannot be compared.
    """
    names = _names(directories)
    runs = [
        load_run(path, name=name, image_root=image_root)
        for path, name in zip(directories, names, strict=True)
    ]
    for other in runs[1:]:
        check_same_images(runs[0].images, runs[0].directory, other.images, other.directory, file_names=False)
    return runs


def load_run(directory: Path, *, name: str | None = None, image_root: Path | None = None) -> ReportRun:
    """One run; see `load_runs`."""
    name = name or directory.resolve().name
    traces: Mapping[ImageId, AnswerTrace] = {}
    if (directory / SCORED).is_file():
        found = load_scored_run(directory)
        detections, traces = ScoredSet(name, found.images, seconds=found.seconds), found.traces
        root, extent = _data_folder(directory), 1.0
    elif (directory / COCO_GT).is_file() and (directory / COCO_PREDS).is_file():
        detections = from_coco_files(directory / COCO_GT, directory / COCO_PREDS)
        _check_sizes(detections, directory / COCO_GT)
        root, extent = directory, 0.0
    else:
        raise RecordError(
            f"{directory} holds neither {SCORED} (`coordexp score --run {directory}` makes it) nor {COCO_GT} with "
            f"{COCO_PREDS} (`coordexp eval --format coco` writes them)."
        )
    images = sorted(detections.images, key=lambda image: id_order(image.image_id))
    return ReportRun(
        directory=directory,
        detections=replace(detections, name=name, images=images),
        desc_map=_recorded_mapping(directory),
        traces=traces,
        image_root=image_root or root,
        box_extent=extent,
    )


def _recorded_mapping(directory: Path) -> dict[str, str] | None:
    report = directory / DESC_MAPPING
    if not report.is_file():
        return None
    return {entry["desc"]: entry["category"] for entry in read_json(report)["mapped"]}


def _data_folder(directory: Path) -> Path:
    meta = directory / RUN_META
    return Path(read_json(meta)["data"]).parent if meta.is_file() else directory


def _check_sizes(detections: ScoredSet, path: Path) -> None:
    for index, image in enumerate(detections.images):
        if not (image.width and image.height):
            raise RecordError(
                f"{path}: images[{index}] (id {image.image_id}) has no width and height, which the report needs to "
                "draw boxes."
            )


def _names(directories: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as it takes to tell the runs apart."""
    resolved = [path.resolve() for path in directories]
    if len(set(resolved)) < len(resolved):
        raise RecordError(f"the same run is given twice: {', '.join(map(str, directories))}.")
    for depth in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            break
    return names
