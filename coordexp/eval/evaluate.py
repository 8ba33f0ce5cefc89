"""From scored predictions to every number and table of an evaluation.

    evaluation = evaluate(from_run(Path("runs/eval")), EvalSettings(iou_type="segm"))
    evaluation.metrics["AP"], evaluation.metrics["f1_at_50"]
    write_evaluation(evaluation, Path("runs/eval"))

`from_run` takes a run of `coordexp infer` and `coordexp score`, `from_coco_files` plain COCO files of any detector.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordexp.errors import ConfigError, RecordError
from coordexp.eval.box_matching import BoxSet
from coordexp.eval.calibration import THRESHOLDS, Calibration, calibration_of
from coordexp.eval.coco.annotations import CocoDict, CocoResults, Dataset, Results
from coordexp.eval.coco.evaluate import (
    DEFAULT_ENGINE,
    LVIS_NAMES,
    MAX_DETS,
    CocoEvaluation,
    run_coco,
    run_lvis,
)
from coordexp.eval.coco.external import coco_images, load_dataset, load_results
from coordexp.eval.coco.federation import LVIS_MAX_DETS, is_federated
from coordexp.eval.coco.fields import id_order
from coordexp.eval.coco.from_images import category_names, coco_of
from coordexp.eval.desc_mapping import DEFAULT_THRESHOLD, DESC_MATCHES, DescEmbedder, DescMapping, map_descs
from coordexp.eval.detection import COCO_THRESHOLDS, DetectionSummary, class_averaged_f1, match_boxes
from coordexp.eval.predictions.artifacts import BAD_PICTURE
from coordexp.eval.predictions.image_result import ImageResult, duplicate_rate
from coordexp.eval.predictions.scored import check_same_images, load_scored_run, recorded_decoding
from coordexp.eval.tables import (
    PER_CLASS_COLUMNS,
    class_rows,
    image_rows,
    pr_curves,
    size_table,
    threshold_row,
    write_csv,
)
from coordexp.files import is_file, write_json, write_large_json
from coordexp.geometry import FloatArray

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
    iou_thresholds: for F1, beside 0.50:0.05:0.95.  scope: see `match_boxes`.
    max_dets: see `run_coco`; None for 1, 10 and 100.  lvis: AP by the rules of LVIS; None where the data says what
    those need (`is_federated`).
    desc_match: "exact" or "semantic"; semantic_model: folder of a sentence-transformers model, None for the
    packaged one; semantic_threshold: smallest cosine similarity that maps.
    """

    engine: str = DEFAULT_ENGINE
    iou_type: str = "bbox"
    iou_thresholds: tuple[float, ...] = ()
    scope: str = "all"
    max_dets: tuple[int, ...] | None = None
    lvis: bool | None = None
    desc_match: str = "exact"
    semantic_model: str | None = None
    semantic_threshold: float = DEFAULT_THRESHOLD

    def __post_init__(self) -> None:
        if self.desc_match not in DESC_MATCHES:
            raise ConfigError(f"desc_match is {self.desc_match!r}: expected one of {', '.join(DESC_MATCHES)}")

    def average_precision(self, dataset: Dataset, results: Results) -> CocoEvaluation:
        """Average precision by COCO's or LVIS's rules; ConfigError for what the latter leave no choice of."""
        if not (is_federated(dataset) if self.lvis is None else self.lvis):
            limits = self.max_dets or MAX_DETS
            return run_coco(dataset, results, iou_type=self.iou_type, engine=self.engine, max_dets=limits)
        if self.engine != DEFAULT_ENGINE or self.max_dets not in (None, (LVIS_MAX_DETS,)):
            raise ConfigError(
                f"LVIS numbers are computed by {DEFAULT_ENGINE}, of {LVIS_MAX_DETS} detections per image, all classes "
                "together. Leave --engine and --max-dets out, or say --no-lvis for COCO numbers."
            )
        return run_lvis(dataset, results, iou_type=self.iou_type)


@dataclass(frozen=True, eq=False)
class ScoredSet:
    """What is evaluated.

    coco: ground truth and results where they are given as such; None makes them from the images.
    seconds: the predictions took to generate, where known.  source: the files, for the record.
    decoding: how the answers were decoded, where known.
    """

    name: str
    images: Sequence[ImageResult]
    coco: tuple[Dataset, Results] | None = None
    seconds: float | None = None
    source: str = ""
    decoding: Mapping[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Every result of one set of predictions.

    images: with descriptions mapped to categories.  dataset, results: what average precision was computed on.
    coco, constant: with the scores, and with every score 1.0.  f1, box_f1: with and without looking at descriptions.
    baseline: headline numbers of another model.
    """

    detections: ScoredSet
    settings: EvalSettings
    images: Sequence[ImageResult]
    mapping: DescMapping
    dataset: Dataset
    results: Results
    coco: CocoEvaluation
    constant: CocoEvaluation
    f1: DetectionSummary
    box_f1: DetectionSummary
    num_images_missing: int | None = None
    baseline: Mapping[str, Any] | None = None

    @property
    def is_lvis(self) -> bool:
        """Whether average precision follows the rules of LVIS."""
        return self.coco.frequencies is not None

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json.

        f1_at_50, f1_50_95: micro F1 where a match needs equal desc and the IoU; 50_95 is the mean over 0.50:0.05:0.95.
        box_f1_*: the same without looking at the desc.  precision_at_50, recall_at_50: of f1_at_50.
        class_averaged_f1_*: see there.  duplicate_rate_mean, _p99: over images, of predictions that repeat an earlier
        one of the same desc with an IoU above 0.9.
        AP...: COCO numbers with the scores; `AP_const` with every score 1.0, which is what a model without confidences
        would get. By the rules of LVIS also APr, APc and APf; `lvis` holds all under the names of the lvis package.
        ece_at_50, ece_isotonic_at_50, ece_at_75, ...: see `coordexp.eval.calibration`, None where scores are no
        probabilities; `calibration` holds the reliability diagrams.
        """
        coco, half, settings = self.coco.metrics, self.f1.at(0.5), asdict(self.settings)
        num_pred, num_crowd = (
            sum(len(image.pred) for image in self.images),
            sum(int(image.gt.crowd_N.sum()) for image in self.images),
        )
        seconds = self.detections.seconds
        metrics = {
            "name": self.detections.name,
            "source": self.detections.source,
            "decoding": self.detections.decoding,
            "settings": settings
            | {
                "iou_thresholds": list(self.f1.thresholds),
                "max_dets": list(self.coco.max_dets),
                "lvis": self.is_lvis,
            },
            "num_images": len(self.images),
            "num_gt": sum(len(image.gt) for image in self.images) - num_crowd,
            "num_crowd": num_crowd,
            "num_pred": num_pred,
            "num_images_missing": self.num_images_missing,
            "num_bad_pictures": sum(BAD_PICTURE in image.errors for image in self.images),
            "num_gt_of_bad_pictures": _num_gt_of_bad_pictures(self.images),
            "f1_at_50": half.micro.f1,
            "precision_at_50": half.micro.precision,
            "recall_at_50": half.micro.recall,
            "f1_50_95": self.f1.f1_50_95,
            "f1_at_95": self.f1.f1_at(0.95),
            **self._class_averaged(),
            **self._duplicates(),
            "box_f1_at_50": self.box_f1.f1_at(0.5),
            "box_f1_50_95": self.box_f1.f1_50_95,
            **coco,
            **({"lvis": {name: coco[key] for name, key in LVIS_NAMES.items()}} if self.is_lvis else {}),
            "AR": coco[f"AR{self.coco.max_dets[-1]}"],
            "AP_const": self.constant.metrics["AP"],
            "const_scores": self.constant.metrics,
            **self._calibration_errors(),
            "rollout_seconds": seconds,
            "boxes_per_second": num_pred / seconds if seconds else None,
            "dropped_unknown_desc": self.mapping.num_dropped,
            "mapped_desc": self.mapping.num_mapped,
            "drop_reasons": _drop_reasons(self.images),
            "f1_by_iou": [threshold_row(at) for at in self.f1.by_threshold],
            "calibration": {
                str(iou): None if found is None else found.as_json() for iou, found in self.calibration.items()
            },
            "by_size": size_table(self.coco, self.dataset.area_M[~self.dataset.crowd_M]),
            "pr_curves": pr_curves(self.coco),
            "per_class": self.per_class,
            "per_class_at_50": {desc: counts._asdict() for desc, counts in half.per_class.items()},
        }  # fmt: skip
        return metrics if self.baseline is None else metrics | {"baseline": dict(self.baseline)}

    @cached_property
    def calibration(self) -> dict[float, Calibration | None]:
        """Of the scores, by IoU."""
        half_N = self.in_second_half_N
        return {iou: calibration_of(self.f1, self.scores_P, half_N, iou) for iou in THRESHOLDS}

    @property
    def scores_P(self) -> FloatArray:
        """Of all predictions, image after image."""
        return np.concatenate([image.pred.scores_N for image in self.images])

    @property
    def in_second_half_N(self) -> NDArray[np.bool_]:
        """Every second image in the order of ids."""
        by_id = sorted(range(len(self.images)), key=lambda n: id_order(self.images[n].image_id))
        in_second_half_N = np.zeros(len(by_id), dtype=bool)
        in_second_half_N[by_id[1::2]] = True
        return in_second_half_N

    def _calibration_errors(self) -> dict[str, float | None]:
        errors: dict[str, float | None] = {}
        for iou, found in self.calibration.items():
            at = f"at_{round(100 * iou)}"
            errors[f"ece_{at}"] = None if found is None else found.ece
            errors[f"ece_isotonic_{at}"] = None if found is None else found.ece_isotonic
        return errors

    def _class_averaged(self) -> dict[str, float]:
        at = {threshold: class_averaged_f1(self.f1.at(threshold)) for threshold in COCO_THRESHOLDS}
        return {
            "class_averaged_f1_at_50": at[0.5],
            "class_averaged_f1_at_95": at[0.95],
            "class_averaged_f1_50_95": sum(at.values()) / len(at),
        }

    def _duplicates(self) -> dict[str, float]:
        rates = [duplicate_rate(image.pred) for image in self.images]
        return {
            "duplicate_rate_mean": float(np.mean(rates)),
            "duplicate_rate_p99": float(np.percentile(rates, 99)),
        }

    @cached_property
    def per_image(self) -> list[dict[str, Any]]:
        """The content of per_image.json."""
        return image_rows(self.images, self.f1)

    @cached_property
    def per_class(self) -> list[dict[str, Any]]:
        """The rows of per_class.csv."""
        num_pred = Counter(chain.from_iterable(image.pred.descs for image in self.images))
        return class_rows(self.coco, self.f1, num_pred)

    @cached_property
    def coco_gt(self) -> CocoDict:
        """The content of coco_gt.json."""
        return self.dataset.as_coco(segmentations=self._has_masks)

    @cached_property
    def coco_preds(self) -> CocoResults:
        """The content of coco_preds.json."""
        return self.results.as_coco(segmentations=self._has_masks)

    @property
    def _has_masks(self) -> bool:
        return self.detections.coco is None or self.settings.iou_type == "segm"


def from_run(run: Path) -> ScoredSet:
    """The scored predictions of a run folder (or of a scored file); RecordError for what cannot be evaluated."""
    found = load_scored_run(run)
    name = run.resolve().name if run.is_dir() else run.resolve().parent.name
    return ScoredSet(
        name,
        found.images,
        seconds=found.seconds,
        source=str(found.path),
        decoding=recorded_decoding(found.path),
    )


def from_coco_files(gt_path: Path, pred_path: Path, iou_type: str = "bbox") -> ScoredSet:
    """Plain COCO ground truth and results; RecordError naming file and entry for what cannot be evaluated."""
    dataset = load_dataset(gt_path)
    results = load_results(pred_path, dataset, dataset_path=gt_path, iou_type=iou_type)
    images = coco_images(dataset, results)
    return ScoredSet(pred_path.stem, images, (dataset, results), source=str(pred_path))


def evaluate(
    detections: ScoredSet,
    settings: EvalSettings | None = None,
    *,
    embed: DescEmbedder | None = None,
    desc_map: Mapping[str, str] | None = None,
    image_root: Path | None = None,
) -> Evaluation:
    """Every number and table of one set of predictions.

    embed: shared between evaluations so that descriptions are embedded once; None makes one when needed.
    desc_map: categories of descriptions that are none, as an earlier evaluation mapped them; None maps anew.
    image_root: where image names start; given, missing image files are counted.
    """
    settings = settings or EvalSettings()
    mapping = _map_descs(detections, settings, embed)
    desc_map = mapping.desc_map if desc_map is None else desc_map
    images = [
        replace(image, pred=image.pred.renamed(desc_map)) if desc_map else image
        for image in detections.images
    ]
    boxes = BoxSet.of(images)
    dataset, results = detections.coco or coco_of(images)
    coco, constant = (
        settings.average_precision(dataset, found)
        for found in (results, replace(results, score_M=np.ones_like(results.score_M)))
    )
    return Evaluation(
        detections=detections,
        settings=settings,
        images=images,
        mapping=mapping,
        dataset=dataset,
        results=results,
        coco=coco,
        constant=constant,
        f1=match_boxes(boxes, {*COCO_THRESHOLDS, *settings.iou_thresholds}, scope=settings.scope),
        box_f1=match_boxes(boxes, class_aware=False, scope=settings.scope),
        num_images_missing=None if image_root is None else _num_missing(images, image_root),
    )


def with_baseline(evaluation: Evaluation, baseline: Evaluation, name: str = "") -> Evaluation:
    """`evaluation` whose metrics hold the headline numbers of another model (the untuned one, say) as `baseline`."""
    row = headline(baseline.metrics) | {"source": baseline.metrics["source"]}
    return replace(evaluation, baseline=row | ({"name": name} if name else {}))


def check_baseline(detections: ScoredSet, baseline: ScoredSet) -> None:
    """RecordError unless both are of the same images with the same ground truth, naming what differs."""
    check_same_images(detections.images, Path(detections.source), baseline.images, Path(baseline.source))


def headline(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers that stand side by side in the first table."""
    return {"name": metrics["name"], **{key: metrics[key] for key in HEADLINE}}


def write_evaluation(evaluation: Evaluation, directory: Path) -> None:
    """Write an evaluation's files, metrics.json last: where it stands, the others are complete."""
    write_large_json(directory / COCO_GT, evaluation.coco_gt)
    write_large_json(directory / COCO_PREDS, evaluation.coco_preds)
    write_large_json(directory / PER_IMAGE, evaluation.per_image)
    write_csv(directory / PER_CLASS, PER_CLASS_COLUMNS, evaluation.per_class)
    write_json(directory / DESC_MAPPING, evaluation.mapping.report())
    write_json(directory / METRICS, evaluation.metrics)


def evaluate_directory(directory: Path, settings: EvalSettings | None = None) -> dict[str, Any]:
    """Evaluate a run's scored file, write the files of `write_evaluation` beside it, and return the metrics."""
    evaluation = evaluate(from_run(directory), settings)
    write_evaluation(evaluation, directory)
    return evaluation.metrics


def _map_descs(detections: ScoredSet, settings: EvalSettings, embed: DescEmbedder | None) -> DescMapping:
    """What becomes of predicted descriptions that are no category.

    One without a category stays: average precision leaves it out, F1 counts it as a false positive unless the scope is
    "annotated".
    """
    if detections.coco is not None:
        categories = sorted(detections.coco[0].category_names)
    else:
        categories = sorted(category_names(detections.images))
    if settings.desc_match == "semantic" and embed is None:
        embed = DescEmbedder(settings.semantic_model)
    return map_descs(
        chain.from_iterable(image.pred.descs for image in detections.images),
        categories,
        embed=embed if settings.desc_match == "semantic" else None,
        threshold=settings.semantic_threshold,
    )


def _drop_reasons(images: Sequence[ImageResult]) -> dict[str, int]:
    """What the parser dropped and scoring left out, summed over images."""
    reasons: Counter[str] = Counter()
    for image in images:
        reasons.update(image.errors)
    del reasons[BAD_PICTURE]  # of no answer; counted by itself
    return dict(sorted(reasons.items()))


def _num_gt_of_bad_pictures(images: Sequence[ImageResult]) -> int:
    """Objects that could only be missed: inference could not use their picture."""
    return sum(int((~image.gt.crowd_N).sum()) for image in images if BAD_PICTURE in image.errors)


def _num_missing(images: Sequence[ImageResult], image_root: Path) -> int:
    if not image_root.is_dir():
        raise RecordError(f"{image_root} is no folder: expected the one that the image names start from.")
    return sum(not is_file(image_root / image.file_name) for image in images)
