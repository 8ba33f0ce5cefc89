"""What a report is made from: the images of evaluated runs, with ground truth, predictions and, where known, the text.

A run is a folder in one of two layouts:

- of `coordexp infer`, `score` and (not needed) `eval`: `gt_vs_pred_scored.jsonl`, beside it the token trace;
- of `coordexp eval --format coco`: `coco_gt.json` and `coco_preds.json`.

Everything the report shows is computed from these files, by the same code as `coordexp eval`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from coordexp.errors import RecordError
from coordexp.eval.coco.evaluate import ImageDetections, to_coco
from coordexp.eval.coco.external import coco_lines, load_dataset, load_results
from coordexp.eval.coco.fields import Id, first, id_order
from coordexp.eval.desc_mapping import map_descs
from coordexp.eval.evaluate import COCO_GT, COCO_PREDS, DESC_MAPPING
from coordexp.eval.predictions.artifacts import RUN_META, SCORED, TOKEN_TRACE, read_jsonl_lines
from coordexp.eval.predictions.scored import check_same_run, read_scored
from coordexp.files import read_json
from coordexp.geometry import polygon_box

XYXY = tuple[float, float, float, float]


class Truth(NamedTuple):
    """A ground-truth object. area: as the COCO size classes take it, in square pixels."""

    desc: str
    box_xyxy: XYXY
    area: float


class Prediction(NamedTuple):
    """A predicted object."""

    desc: str
    box_xyxy: XYXY
    score: float


@dataclass(frozen=True)
class ReportImage:
    """One image of a run, boxes in pixels.

    crowd: regions that are neither hits nor misses.  errors: what the parser dropped, by reason.
    text, num_tokens: the model's answer, None where the run holds no token trace.
    """

    image_id: Id
    file_name: str
    width: int
    height: int
    gt: tuple[Truth, ...]
    pred: tuple[Prediction, ...]
    crowd: tuple[Truth, ...] = ()
    errors: dict[str, int] = field(default_factory=dict)
    text: str | None = None
    num_tokens: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class ReportRun:
    """One run, images by ascending id.

    coco_gt, coco_preds: what average precision is computed on.  image_root: where file names start.
    box_extent: 1 where x2, y2 name the last pixel of an object, 0 where they are its far edge (COCO); for drawing.
    """

    name: str
    directory: Path
    images: tuple[ReportImage, ...]
    coco_gt: dict[str, Any]
    coco_preds: list[dict[str, Any]]
    image_root: Path
    box_extent: float


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
        _check_comparable(runs[0], other)
    return runs


def load_run(directory: Path, *, name: str | None = None, image_root: Path | None = None) -> ReportRun:
    """One run; see `load_runs`."""
    name = name or directory.resolve().name
    if (directory / SCORED).is_file():
        return _load_scored(directory, name, image_root)
    if (directory / COCO_GT).is_file() and (directory / COCO_PREDS).is_file():
        return _load_coco(directory, name, image_root)
    raise RecordError(
        f"{directory} holds neither {SCORED} (`coordexp score --run {directory}` makes it) nor {COCO_GT} with "
        f"{COCO_PREDS} (`coordexp eval --format coco` writes them)."
    )


def _load_scored(directory: Path, name: str, image_root: Path | None) -> ReportRun:
    path = directory / SCORED
    lines = read_scored(path)
    check_same_run(lines, path)
    lines = _with_categories(lines, directory)
    traces = {}
    if (directory / TOKEN_TRACE).is_file():
        traces = {
            trace["image_id"]: trace for trace in read_jsonl_lines(directory / TOKEN_TRACE, ("image_id",))
        }
    coco = to_coco(
        ImageDetections(
            image_id=line["image_id"], width=line["width"], height=line["height"], file_name=line["image"],
            gt=[(obj["desc"], obj["points"]) for obj in line["gt"]],
            pred=[(obj["desc"], obj["points"], obj["score"]) for obj in line["pred"]],
        )
        for line in lines
    )  # fmt: skip
    images = _images(lines, coco.gt, traces)
    return ReportRun(
        name, directory, images, coco.gt, coco.preds, image_root or _data_folder(directory), box_extent=1.0
    )


def _load_coco(directory: Path, name: str, image_root: Path | None) -> ReportRun:
    dataset = load_dataset(directory / COCO_GT)
    results = load_results(directory / COCO_PREDS, dataset, dataset_path=directory / COCO_GT)
    fault = first((dataset.sizes_N2 == 0).any(axis=1))
    if fault is not None:
        raise RecordError(
            f"{directory / COCO_GT}: images[{fault}] (id {dataset.image_ids[fault]}) has no width and height, which "
            "the report needs to draw boxes."
        )
    gt = dataset.as_coco()
    images = _images(coco_lines(dataset, results), gt, {})
    return ReportRun(name, directory, images, gt, results.as_coco(), image_root or directory, box_extent=0.0)


def _with_categories(lines: list[dict[str, Any]], directory: Path) -> list[dict[str, Any]]:
    """The lines with descriptions mapped to categories as `coordexp eval` did, by its report where there is one."""
    report = directory / DESC_MAPPING
    if report.is_file():
        desc_map = {entry["desc"]: entry["category"] for entry in read_json(report)["mapped"]}
    else:
        categories = sorted({obj["desc"] for line in lines for obj in line["gt"]})
        desc_map = map_descs((obj["desc"] for line in lines for obj in line["pred"]), categories).desc_map
    return [
        {**line, "pred": [{**obj, "desc": desc_map.get(obj["desc"], obj["desc"])} for obj in line["pred"]]}
        for line in lines
    ]


def _images(
    lines: Sequence[dict[str, Any]], gt: dict[str, Any], traces: dict[Id, dict[str, Any]]
) -> tuple[ReportImage, ...]:
    """Images by ascending id. gt: COCO data set of the lines, whose annotations are in the order of their objects."""
    areas: dict[Id, list[float]] = defaultdict(list)
    for annotation in gt["annotations"]:
        areas[annotation["image_id"]].append(annotation["area"])
    return tuple(
        _image(line, areas[line["image_id"]], traces.get(line["image_id"], {}))
        for line in sorted(lines, key=lambda line: id_order(line["image_id"]))
    )


def _image(line: dict[str, Any], areas: Sequence[float], trace: dict[str, Any]) -> ReportImage:
    truths = [
        (Truth(obj["desc"], _box(obj["points"]), area), bool(obj.get("crowd")))
        for obj, area in zip(line["gt"], areas, strict=True)
    ]
    return ReportImage(
        image_id=line["image_id"],
        file_name=line["image"],
        width=line["width"],
        height=line["height"],
        gt=tuple(truth for truth, is_crowd in truths if not is_crowd),
        crowd=tuple(truth for truth, is_crowd in truths if is_crowd),
        pred=tuple(Prediction(obj["desc"], _box(obj["points"]), obj["score"]) for obj in line["pred"]),
        errors={**(line.get("errors") or {}), **(line.get("pred_score_failures") or {})},
        text=trace.get("text"),
        num_tokens=len(trace["generated_token_text"]) if "generated_token_text" in trace else None,
        seconds=trace.get("seconds"),
    )


def _data_folder(directory: Path) -> Path:
    meta = directory / RUN_META
    return Path(read_json(meta)["data"]).parent if meta.is_file() else directory


def _box(points: Sequence[float]) -> XYXY:
    x1, y1, x2, y2 = points if len(points) == 4 else polygon_box(points).tolist()
    return x1, y1, x2, y2


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


def _check_comparable(first: ReportRun, other: ReportRun) -> None:
    """RecordError unless both runs have the same images (by id) with the same objects."""
    mine, theirs = ({image.image_id: image for image in run.images} for run in (first, other))
    only = sorted(mine.keys() ^ theirs.keys(), key=id_order)
    if only:
        holder = first if only[0] in mine else other
        raise RecordError(
            f"{first.directory} and {other.directory} cannot be compared: {len(mine)} and {len(theirs)} images; "
            f"image_id {only[0]} is in {holder.directory} only. Evaluate both on the same images."
        )
    for image_id, image in mine.items():
        if _differs(image, theirs[image_id]):
            raise RecordError(
                f"{first.directory} and {other.directory} cannot be compared: image_id {image_id} "
                f"({image.file_name} and {theirs[image_id].file_name}) has other ground truth. Evaluate both on "
                "the same data file."
            )


def _differs(image: ReportImage, other: ReportImage) -> bool:
    """Whether size or objects differ; boxes may by a hundredth of a pixel, which decimals in a file cost."""
    if (image.width, image.height, len(image.gt)) != (other.width, other.height, len(other.gt)):
        return True
    pairs = zip(sorted(image.gt), sorted(other.gt), strict=True)
    return any(
        a.desc != b.desc or any(abs(u - v) > 0.01 for u, v in zip(a.box_xyxy, b.box_xyxy, strict=True))
        for a, b in pairs
    )
