"""From scored predictions to every number and table of an evaluation.

    evaluation = evaluate(from_run(Path("runs/eval")), EvalSettings(engine="faster-coco-eval"))
    evaluation.metrics["AP"], evaluation.metrics["f1_at_50"]
    write_evaluation(evaluation, Path("runs/eval"))

`from_run` takes a run of `coordexp infer` and `coordexp score`, `from_coco_files` plain COCO files of any detector.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from coordexp.errors import ConfigError, RecordError
from coordexp.eval.coco.annotations import CocoDict, CocoResults, Dataset, Results, read_dataset, read_results
from coordexp.eval.coco.evaluate import MAX_DETS, ImageDetections, run_coco, to_coco
from coordexp.eval.coco.external import coco_lines, load_dataset, load_results
from coordexp.eval.desc_mapping import DEFAULT_THRESHOLD, DESC_MATCHES, DescEmbedder, DescMapping, map_descs
from coordexp.eval.detection import COCO_THRESHOLDS, DetectionMetrics
from coordexp.eval.predictions.scored import (
    check_same_images,
    check_same_run,
    read_scored,
    rollout_seconds,
    scored_file,
)
from coordexp.eval.tables import (
    PER_CLASS_COLUMNS,
    class_rows,
    image_row,
    pr_curves,
    size_table,
    threshold_row,
    write_csv,
)
from coordexp.files import is_file, write_json
from coordexp.geometry import polygon_box

METRICS, PER_IMAGE, PER_CLASS = "metrics.json", "per_image.json", "per_class.csv"
COCO_GT, COCO_PREDS, DESC_MAPPING = "coco_gt.json", "coco_preds.json", "desc_mapping.json"
HEADLINE = (
    "AP",
    "AP50",
    "AP75",
    "AR",
    "AP_const",
    "f1_50_95",
    "f1_at_50",
    "box_f1_at_50",
    "boxes_per_second",
)


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """How to evaluate.

    iou_type: what AP looks at, "bbox" or "segm" (polygons, boxes as quadrilaterals); F1 always takes boxes.
    iou_thresholds: for F1, beside 0.50:0.05:0.95.  scope: see `DetectionMetrics`.  max_dets: see `run_coco`.
    desc_match: "exact" or "semantic"; semantic_model: folder of a sentence-transformers model, None for the
    packaged one; semantic_threshold: smallest cosine similarity that maps.
    """

    engine: str = "pycocotools"
    iou_type: str = "bbox"
    iou_thresholds: tuple[float, ...] = ()
    scope: str = "all"
    max_dets: tuple[int, ...] = MAX_DETS
    desc_match: str = "exact"
    semantic_model: str | None = None
    semantic_threshold: float = DEFAULT_THRESHOLD

    def __post_init__(self) -> None:
        if self.desc_match not in DESC_MATCHES:
            raise ConfigError(f"desc_match is {self.desc_match!r}: expected one of {', '.join(DESC_MATCHES)}")


@dataclass(frozen=True)
class Detections:
    """What is evaluated.

    lines: one per image, in the form of `gt_vs_pred_scored.jsonl`; a ground-truth object may be a `crowd`.
    coco: ground truth and results where they are given as such; None builds them from the lines.
    seconds: the predictions took to generate, where known.  source: the files, for the record.
    """

    name: str
    lines: Sequence[dict[str, Any]]
    coco: tuple[Dataset, Results] | None = None
    seconds: float | None = None
    source: str = ""


@dataclass(frozen=True)
class Evaluation:
    """Everything that `write_evaluation` writes."""

    metrics: dict[str, Any]
    per_image: list[dict[str, Any]]
    per_class: list[dict[str, Any]]
    coco_gt: CocoDict
    coco_preds: CocoResults
    desc_mapping: dict[str, Any]


def from_run(run: Path) -> Detections:
    """The scored predictions of a run folder (or of a scored file); RecordError for what cannot be evaluated."""
    path = scored_file(run)
    lines = read_scored(path)
    check_same_run(lines, path)
    name = run.resolve().name if run.is_dir() else run.resolve().parent.name
    return Detections(name, lines, seconds=rollout_seconds(lines, path), source=str(path))


def from_coco_files(gt_path: Path, pred_path: Path, iou_type: str = "bbox") -> Detections:
    """Plain COCO ground truth and results; RecordError naming file and entry for what cannot be evaluated."""
    dataset = load_dataset(gt_path)
    results = load_results(pred_path, dataset, dataset_path=gt_path, iou_type=iou_type)
    return Detections(pred_path.stem, coco_lines(dataset, results), (dataset, results), source=str(pred_path))


def evaluate(
    detections: Detections,
    settings: EvalSettings | None = None,
    *,
    embed: DescEmbedder | None = None,
    image_root: Path | None = None,
) -> Evaluation:
    """Every number and table of one set of predictions.

    embed: shared between evaluations so that descriptions are embedded once; None makes one when needed.
    image_root: where image names start; given, missing image files are counted.
    """
    settings = settings or EvalSettings()
    lines, mapping = _with_categories(detections, settings, embed)
    dataset, results = detections.coco or _coco_of(lines)
    run = partial(run_coco, iou_type=settings.iou_type, engine=settings.engine, max_dets=settings.max_dets)
    coco = run(dataset, results)
    const = run(dataset, replace(results, score_M=np.ones_like(results.score_M)))
    f1 = DetectionMetrics({*COCO_THRESHOLDS, *settings.iou_thresholds}, scope=settings.scope)
    boxes_f1 = DetectionMetrics(class_aware=False, scope=settings.scope)
    per_image = []
    for line in lines:
        crowd = [bool(obj.get("crowd")) for obj in line["gt"]]
        pred, truth = boxes_and_descs(line["pred"]), boxes_and_descs(line["gt"])
        matches = f1.update(*pred, *truth, crowd)
        boxes_f1.update(*pred, *truth, crowd)
        per_image.append(image_row(line, matches, f1.thresholds))
    summary, boxes_summary = f1.compute(), boxes_f1.compute()
    per_class = class_rows(coco, summary, Counter(obj["desc"] for line in lines for obj in line["pred"]))
    half, num_pred = summary.at(0.5), sum(len(line["pred"]) for line in lines)
    metrics = {
        "name": detections.name,
        "source": detections.source,
        "settings": {**asdict(settings), "iou_thresholds": list(f1.thresholds), "max_dets": list(settings.max_dets)},
        "num_images": len(lines),
        "num_gt": sum(not obj.get("crowd") for line in lines for obj in line["gt"]),
        "num_crowd": sum(bool(obj.get("crowd")) for line in lines for obj in line["gt"]),
        "num_pred": num_pred,
        "num_images_missing": None if image_root is None else _num_missing(lines, image_root),
        "f1_at_50": half.micro.f1,
        "precision_at_50": half.micro.precision,
        "recall_at_50": half.micro.recall,
        "f1_50_95": sum(summary.f1_at(iou) for iou in COCO_THRESHOLDS) / len(COCO_THRESHOLDS),
        "box_f1_at_50": boxes_summary.f1_at(0.5),
        "box_f1_50_95": boxes_summary.mean_f1,
        **coco.metrics,
        "AR": coco.metrics[f"AR{settings.max_dets[-1]}"],
        "AP_const": const.metrics["AP"],
        "const_scores": const.metrics,
        "rollout_seconds": detections.seconds,
        "boxes_per_second": num_pred / detections.seconds if detections.seconds else None,
        "dropped_unknown_desc": mapping.num_dropped,
        "mapped_desc": mapping.num_mapped,
        "drop_reasons": _drop_reasons(lines),
        "f1_by_iou": [threshold_row(at) for at in summary.by_threshold],
        "by_size": size_table(coco, dataset.area_M[~dataset.crowd_M]),
        "pr_curves": pr_curves(coco),
        "per_class": per_class,
        "per_class_at_50": {desc: counts._asdict() for desc, counts in half.per_class.items()},
    }  # fmt: skip
    masks = detections.coco is None or settings.iou_type == "segm"
    gt, preds = dataset.as_coco(segmentations=masks), results.as_coco(segmentations=masks)
    return Evaluation(metrics, per_image, per_class, gt, preds, mapping.report())


def with_baseline(evaluation: Evaluation, baseline: Evaluation, name: str = "") -> Evaluation:
    """`evaluation` whose metrics hold the headline numbers of another model (the untuned one, say) as `baseline`."""
    row = headline(baseline.metrics) | {"name": name or baseline.metrics["name"]}
    row["source"] = baseline.metrics["source"]
    return replace(evaluation, metrics={**evaluation.metrics, "baseline": row})


def check_baseline(detections: Detections, baseline: Detections) -> None:
    """RecordError unless both are of the same images with the same ground truth, naming what differs."""
    check_same_images(detections.lines, Path(detections.source), baseline.lines, Path(baseline.source))


def headline(metrics: dict[str, Any]) -> dict[str, Any]:
    """The numbers that stand side by side in the first table."""
    return {"name": metrics["name"], **{key: metrics[key] for key in HEADLINE}}


def write_evaluation(evaluation: Evaluation, directory: Path) -> None:
    """Write an evaluation's files, metrics.json last: where it stands, the others are complete."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / COCO_GT, evaluation.coco_gt, indent=None)
    write_json(directory / COCO_PREDS, evaluation.coco_preds, indent=None)
    write_json(directory / PER_IMAGE, evaluation.per_image, indent=None)
    write_csv(directory / PER_CLASS, PER_CLASS_COLUMNS, evaluation.per_class)
    write_json(directory / DESC_MAPPING, evaluation.desc_mapping)
    write_json(directory / METRICS, evaluation.metrics)


def evaluate_lines(lines: Sequence[dict[str, Any]], *, engine: str = "pycocotools") -> dict[str, Any]:
    """Metrics of scored lines.

    f1_at_50, f1_50_95: micro F1 where a match needs equal desc and the IoU; 50_95 is the mean over 0.50:0.05:0.95.
    box_f1_*: the same without looking at the desc.  precision_at_50, recall_at_50: of f1_at_50.
    AP...: COCO numbers with the file's scores; `AP_const` with every score 1.0, which is what a model without
    confidences would get.
    """
    return evaluate(Detections("", lines), EvalSettings(engine=engine)).metrics


def evaluate_directory(directory: Path, *, engine: str = "pycocotools") -> dict[str, Any]:
    """Evaluate a run's scored file, write the files of `write_evaluation` beside it, and return the metrics."""
    evaluation = evaluate(from_run(directory), EvalSettings(engine=engine))
    write_evaluation(evaluation, directory)
    return evaluation.metrics


def boxes_and_descs(objects: Sequence[dict[str, Any]]) -> tuple[list[list[float]], list[str]]:
    """Boxes xyxy (around polygons) and descriptions of the objects of a line."""
    boxes = [
        obj["points"] if len(obj["points"]) == 4 else polygon_box(obj["points"]).tolist() for obj in objects
    ]
    return boxes, [obj["desc"] for obj in objects]


def _with_categories(
    detections: Detections, settings: EvalSettings, embed: DescEmbedder | None
) -> tuple[list[dict[str, Any]], DescMapping]:
    """The lines with mapped descriptions replaced (`written_desc` keeps the model's), and what was mapped.

    A description without a category stays: average precision leaves it out, F1 counts it as a false positive
    unless the scope is "annotated".
    """
    categories = sorted({obj["desc"] for line in detections.lines for obj in line["gt"]})
    if detections.coco is not None:
        categories = sorted(detections.coco[0].category_names)
    if settings.desc_match == "semantic" and embed is None:
        embed = DescEmbedder(settings.semantic_model)
    mapping = map_descs(
        (obj["desc"] for line in detections.lines for obj in line["pred"]),
        categories,
        embed=embed if settings.desc_match == "semantic" else None,
        threshold=settings.semantic_threshold,
    )
    desc_map = mapping.desc_map
    if not desc_map:
        return list(detections.lines), mapping
    return [
        {**line, "pred": [_renamed(obj, desc_map) for obj in line["pred"]]} for line in detections.lines
    ], mapping


def _renamed(obj: dict[str, Any], desc_map: dict[str, str]) -> dict[str, Any]:
    desc = obj["desc"]
    return {**obj, "desc": desc_map[desc], "written_desc": desc} if desc in desc_map else obj


def _coco_of(lines: Sequence[dict[str, Any]]) -> tuple[Dataset, Results]:
    export = to_coco(
        ImageDetections(
            image_id=line["image_id"],
            width=line["width"],
            height=line["height"],
            file_name=line["image"],
            gt=[(obj["desc"], obj["points"]) for obj in line["gt"]],
            pred=[(obj["desc"], obj["points"], obj["score"]) for obj in line["pred"]],
        )
        for line in lines
    )
    dataset = read_dataset(export.gt)
    return dataset, read_results(export.preds, dataset)


def _drop_reasons(lines: Sequence[dict[str, Any]]) -> dict[str, int]:
    """What the parser dropped and scoring left out, summed over images."""
    reasons: Counter[str] = Counter()
    for line in lines:
        reasons.update(line.get("errors") or {})
        reasons.update(line.get("pred_score_failures") or {})
    return dict(sorted(reasons.items()))


def _num_missing(lines: Sequence[dict[str, Any]], image_root: Path) -> int:
    if not image_root.is_dir():
        raise RecordError(f"{image_root} is no folder: expected the one that the image names start from.")
    return sum(not is_file(image_root / line["image"]) for line in lines)
