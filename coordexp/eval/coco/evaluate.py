"""COCO average precision and recall, by hotcoco, faster-coco-eval or pycocotools; they give the same numbers.

    metrics = evaluate_coco(gt, preds)                    # {"AP": 0.505, "AP50": 0.697, ...}
    evaluation = run_coco(gt, preds, engine="pycocotools")
    evaluation.per_category_ap()                          # {"cat": 0.61, ...}

`gt` is a COCO dataset dict (images, annotations, categories), `preds` a COCO results list (image_id,
category_id, bbox xywh in pixels, score). The inputs are never changed, and nothing is printed.
`coordexp.eval.coco.from_images.coco_of` makes both from images with objects.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from coordexp.errors import ConfigError
from coordexp.eval.coco.annotations import CocoDict, CocoResults, Dataset, Results, read_dataset, read_results
from coordexp.eval.coco.engine_input import engine_columns, engine_dataset, engine_results
from coordexp.eval.coco.federation import FREQUENCIES, LVIS_MAX_DETS, Federation, read_federation
from coordexp.eval.coco.sizes import SIZES
from coordexp.geometry import FloatArray

ENGINES = ("hotcoco", "faster-coco-eval", "pycocotools")
"""By speed; all give pycocotools' numbers."""
DEFAULT_ENGINE = ENGINES[0]
IOU_TYPES = ("bbox", "segm")

METRIC_NAMES = (
    "AP",  # mean over IoU 0.50:0.05:0.95, at most 100 detections per image
    "AP50",
    "AP75",
    "AP_small",  # ground truth area below 32 x 32 pixels
    "AP_medium",  # 32 x 32 to 96 x 96
    "AP_large",  # above
    "AR1",  # mean over IoU 0.50:0.05:0.95, at most 1 detection per image and category
    "AR10",
    "AR100",
    "AR_small",
    "AR_medium",
    "AR_large",
)
"""Keys of the 12 COCO numbers, in the order of pycocotools' `stats`. -1: no ground truth to measure on."""


FREQUENCY_METRICS = tuple(f"AP{name}" for name in FREQUENCIES)
"""APr, APc, APf, of evaluation as LVIS."""
LVIS_NAMES = {
    "AP": "AP", "AP50": "AP50", "AP75": "AP75", "APs": "AP_small", "APm": "AP_medium", "APl": "AP_large",
    **{name: name for name in FREQUENCY_METRICS},
    f"AR@{LVIS_MAX_DETS}": f"AR{LVIS_MAX_DETS}", f"ARs@{LVIS_MAX_DETS}": "AR_small",
    f"ARm@{LVIS_MAX_DETS}": "AR_medium", f"ARl@{LVIS_MAX_DETS}": "AR_large",
}  # fmt: skip
"""What the lvis package calls the numbers -> what they are called here."""

MAX_DETS = (1, 10, 100)
AREAS = ("all", *SIZES)


@dataclass(frozen=True)
class CocoEvaluation:
    """One evaluation: the 12 numbers, and the tables they were averaged from (-1: no ground truth).

    precision: float64 [T, R, K, A, M], recall: float64 [T, K, A, M], iou_thresholds: [T], recall_points: [R].
    T = 10 IoU thresholds, R = 101 recall points, K = categories by ascending id (`category_names`), A = areas
    (all, small, medium, large), M = detection limits (`max_dets`).
    frequencies: of evaluation as LVIS, "r", "c" or "f" for every category.
    """

    precision: FloatArray
    recall: FloatArray
    category_names: list[str]
    iou_thresholds: FloatArray
    recall_points: FloatArray
    max_dets: tuple[int, ...] = MAX_DETS
    frequencies: tuple[str, ...] | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """The 12 numbers under `METRIC_NAMES` (AR by detection limit when other limits were asked for).

        As LVIS also `FREQUENCY_METRICS`: AP of rare, common and frequent categories.
        """
        return self._numbers(slice(None)) | self._by_frequency()

    def per_category(self) -> dict[str, dict[str, float]]:
        """The same numbers by category name; categories without ground truth are left out."""
        numbers = {name: self._numbers([k]) for k, name in enumerate(self.category_names)}
        return {name: found for name, found in numbers.items() if found["AP"] > -1}

    def per_category_ap(self) -> dict[str, float]:
        """AP over IoU 0.50:0.05:0.95 by category name; categories without ground truth are left out."""
        return {name: numbers["AP"] for name, numbers in self.per_category().items()}

    def pr_curve(self, iou: float | None = None) -> list[float]:
        """Precision at every recall point, mean over the categories with ground truth; [] without any.

        iou: one of the IoU thresholds, None for the mean over all of them.
        """
        precision_TRK = self.precision[self._thresholds(iou), :, :, AREAS.index("all"), -1]
        has_gt_K = (precision_TRK > -1).all(axis=(0, 1))
        if not has_gt_K.any():
            return []
        curve: list[float] = precision_TRK[:, :, has_gt_K].mean(axis=(0, 2)).tolist()
        return curve

    def _by_frequency(self) -> dict[str, float]:
        if self.frequencies is None:
            return {}
        rows = {
            name: [k for k, found in enumerate(self.frequencies) if found == name] for name in FREQUENCIES
        }
        return {f"AP{name}": self._numbers(categories)["AP"] for name, categories in rows.items()}

    def _numbers(self, categories: slice | list[int]) -> dict[str, float]:
        def ap(iou: float | None = None, area: str = "all") -> float:
            table = self.precision[self._thresholds(iou)][:, :, categories, AREAS.index(area), -1]
            return _mean_of_measured(table)

        def ar(limit: int = -1, area: str = "all") -> float:
            return _mean_of_measured(self.recall[:, categories, AREAS.index(area), limit])

        return {
            "AP": ap(),
            "AP50": ap(iou=0.5),
            "AP75": ap(iou=0.75),
            **{f"AP_{size}": ap(area=size) for size in SIZES},
            **{f"AR{most}": ar(index) for index, most in enumerate(self.max_dets)},
            **{f"AR_{size}": ar(area=size) for size in SIZES},
        }

    def _thresholds(self, iou: float | None) -> slice | NDArray[np.bool_]:
        return slice(None) if iou is None else np.isclose(self.iou_thresholds, iou)


def evaluate_coco(
    gt: Mapping[str, Any],
    preds: Sequence[Mapping[str, Any]],
    *,
    iou_type: str = "bbox",
    engine: str = DEFAULT_ENGINE,
) -> dict[str, float]:
    """The 12 COCO numbers under `METRIC_NAMES`, equal to those of the engine run directly.

    gt: COCO dataset (a missing `iscrowd` is 0, a missing `area` the box area).  preds: COCO results or [].
    iou_type: "bbox" or "segm".  engine: one of ENGINES.
    Raises ConfigError for an unknown engine or iou_type, RecordError naming the index of a malformed entry.
    """
    return run_coco(gt, preds, iou_type=iou_type, engine=engine).metrics


def run_coco(
    gt: Mapping[str, Any] | Dataset,
    preds: Sequence[Mapping[str, Any]] | Results,
    *,
    iou_type: str = "bbox",
    engine: str = DEFAULT_ENGINE,
    max_dets: Sequence[int] = MAX_DETS,
) -> CocoEvaluation:
    """As `evaluate_coco`, with the precision and recall tables for curves and per-category numbers.

    gt, preds: as there, or read already (`coordexp.eval.coco.annotations`).
    max_dets: detections looked at per image and category, ascending; AP takes the last, AR every one.
    """
    if engine not in ENGINES:
        raise ConfigError(f"engine is {engine!r}: expected one of {', '.join(ENGINES)}")
    if iou_type not in IOU_TYPES:
        raise ConfigError(f"iou_type is {iou_type!r}: expected one of {', '.join(IOU_TYPES)}")
    if not max_dets or min(max_dets) < 1 or list(max_dets) != sorted(set(max_dets)):
        raise ConfigError(
            f"max_dets are {list(max_dets)}: expected ascending whole numbers of at least 1, such as 1 10 100"
        )
    dataset = gt if isinstance(gt, Dataset) else read_dataset(gt, prefix="gt ")
    results = preds if isinstance(preds, Results) else read_results(preds, dataset, iou_type=iou_type)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = _evaluator(dataset, results, iou_type, engine)
        evaluator.params.maxDets = list(max_dets)
        evaluator.evaluate()
        evaluator.accumulate()
    return _evaluation(evaluator, dataset, tuple(max_dets))


def run_lvis(dataset: Dataset, results: Results, *, iou_type: str = "bbox") -> CocoEvaluation:
    """The same by the rules of LVIS (see `coordexp.eval.coco.federation`), equal to the numbers of its own package.

    At most 300 detections of an image count, the most confident of all classes. Crowd regions are ordinary objects.
    Raises RecordError for a data set that does not say what LVIS needs.
    """
    federation = read_federation(dataset)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = lvis_evaluator(dataset, results, federation, iou_type=iou_type)
        evaluator.accumulate()
    frequencies = [federation.frequencies[row] for row in np.argsort(dataset.category_rank_K).tolist()]
    return replace(_evaluation(evaluator, dataset, (LVIS_MAX_DETS,)), frequencies=tuple(frequencies))


def lvis_evaluator(
    dataset: Dataset, results: Results, federation: Federation, *, iou_type: str = "bbox"
) -> Any:
    """hotcoco's evaluator by the rules of LVIS, with the detections of every image matched."""
    import hotcoco

    evaluator = hotcoco.LVISEval(*_hotcoco_pair(dataset, results, iou_type, federation), iou_type)
    evaluator.evaluate()
    return evaluator


def _evaluation(evaluator: Any, dataset: Dataset, max_dets: tuple[int, ...]) -> CocoEvaluation:
    return CocoEvaluation(
        precision=np.asarray(evaluator.eval["precision"]),
        recall=np.asarray(evaluator.eval["recall"]),
        category_names=dataset.names_by_rank(),
        iou_thresholds=np.asarray(evaluator.params.iouThrs),
        recall_points=np.asarray(evaluator.params.recThrs),
        max_dets=max_dets,
    )


def defined(value: float | None) -> float | None:
    """A COCO number; None for -1, which stands for "no ground truth"."""
    return None if value is None or value < 0 else value


def _mean_of_measured(table: FloatArray) -> float:
    """Mean over the entries with ground truth, -1 if there are none."""
    measured = table[table > -1]
    return float(measured.mean()) if measured.size else -1.0


def _evaluator(columns: Dataset, results: Results, iou_type: str, engine: str) -> Any:
    if engine == "hotcoco":
        import hotcoco

        return hotcoco.COCOeval(*_hotcoco_pair(columns, results, iou_type), iou_type)
    dataset = engine_dataset(columns, iou_type)
    return _slower_evaluator(dataset, engine_results(results, iou_type), iou_type, engine)


def _hotcoco_pair(
    dataset: Dataset, results: Results, iou_type: str, federation: Federation | None = None
) -> tuple[Any, Any]:
    """Ground truth and detections in hotcoco's form."""
    import hotcoco

    truth = hotcoco.COCO(engine_dataset(dataset, iou_type, federation))
    found = engine_columns(results) if iou_type == "bbox" else engine_results(results, iou_type)
    return truth, truth.load_res(found)


def _slower_evaluator(dataset: CocoDict, results: CocoResults, iou_type: str, engine: str) -> Any:
    if engine == "faster-coco-eval":
        import faster_coco_eval  # loads OpenCV, so only when it is asked for

        coco_gt = faster_coco_eval.COCO(dataset)
        return faster_coco_eval.COCOeval_faster(coco_gt, coco_gt.loadRes(results), iouType=iou_type)
    coco_gt = COCO()
    coco_gt.dataset = dataset
    coco_gt.createIndex()
    return COCOeval(coco_gt, coco_gt.loadRes(results) if results else _no_results(dataset), iouType=iou_type)


def _no_results(dataset: CocoDict) -> COCO:
    """What `loadRes` would give for an empty list, which pycocotools refuses."""
    coco_dt = COCO()
    coco_dt.dataset = {"images": dataset["images"], "categories": dataset["categories"], "annotations": []}
    coco_dt.createIndex()
    return coco_dt
