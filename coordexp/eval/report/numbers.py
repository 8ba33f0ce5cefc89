"""The numbers of a report: those of `coordexp eval`, and per class, per size and over confidence.

Everything that needs a match takes IoU 0.5 and equal descriptions, unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from coordexp.eval.box_matching import BoxSet
from coordexp.eval.coco.evaluate import DEFAULT_ENGINE, defined
from coordexp.eval.coco.sizes import SIZES, size_classes
from coordexp.eval.detection import Counts, ImageMatch, match_boxes, scores_of
from coordexp.eval.evaluate import EvalSettings, Evaluation, evaluate
from coordexp.eval.predictions.image_result import ImageResult, Objects
from coordexp.eval.report.data import ReportRun
from coordexp.geometry import FloatArray, pairwise_iou

MATCH_IOU = 0.5


class ConfidenceCurve(NamedTuple):
    """Scores of the predictions at least as confident as each of the distinct confidences, descending. All [S]."""

    confidence: FloatArray
    precision: FloatArray
    recall: FloatArray
    f1: FloatArray

    @property
    def best(self) -> tuple[float, float] | None:
        """(confidence, F1) where F1 is highest; None without predictions."""
        if not len(self.f1):
            return None
        index = int(self.f1.argmax())
        return float(self.confidence[index]), float(self.f1[index])


class SizeRow(NamedTuple):
    """One size class. num_gt, found: by the object's area; num_pred, right: by the predicted box's area."""

    name: str
    num_gt: int
    found: int
    num_pred: int
    right: int
    average_precision: float | None
    average_recall: float | None


class ClassRow(NamedTuple):
    """One description. average_precision: None without ground truth."""

    name: str
    counts: Counts
    average_precision: float | None


@dataclass(frozen=True, eq=False)
class RunNumbers:
    """All numbers of one run."""

    run: ReportRun
    evaluation: Evaluation

    @property
    def images(self) -> Sequence[ImageResult]:
        """The run's images, with descriptions mapped to categories."""
        return self.evaluation.images

    @cached_property
    def matches(self) -> list[ImageMatch]:
        """Who was matched with whom in each image."""
        return self.evaluation.f1.matches(MATCH_IOU)

    @cached_property
    def confidence(self) -> ConfidenceCurve:
        """Scores over confidence."""
        return confidence_curve(self.images)

    def headline(self, key: str) -> float | None:
        """A number of metrics.json; None where it cannot be measured."""
        return defined(self.evaluation.metrics[key])


def compute_numbers(run: ReportRun, *, engine: str = DEFAULT_ENGINE) -> RunNumbers:
    """Evaluate one run. engine: as for `coordexp eval`."""
    return RunNumbers(run, evaluate(run.detections, EvalSettings(engine=engine), desc_map=run.desc_map))


def same_class_iou(image: ImageResult) -> FloatArray:
    """IoU of every prediction with every object, 0 for crowd regions and where descriptions differ.  [P, G]"""
    iou_PG = pairwise_iou(image.pred.boxes_N4, image.gt.boxes_N4)
    pred_descs, gt_descs = (np.array(side.descs, dtype=object) for side in (image.pred, image.gt))
    same_class: FloatArray = iou_PG * (pred_descs[:, None] == gt_descs[None, :]) * ~image.gt.crowd_N
    return same_class


def confidence_curve(images: Sequence[ImageResult]) -> ConfidenceCurve:
    """Precision, recall and F1 of the predictions kept at every confidence threshold.

    At each threshold the kept predictions are matched as `match_boxes` does, so that the last point is the F1 of all
    predictions.
    """
    steps = [step for image in images for step in _steps(image)]
    num_gt = sum(int((~image.gt.crowd_N).sum()) for image in images)
    scores, hits, errors = (
        (np.array(column) for column in zip(*steps, strict=True)) if steps else np.zeros((3, 0))
    )
    descending = np.argsort(-scores, kind="stable")
    score_S = scores[descending]
    last_of_tie = np.append(score_S[1:] != score_S[:-1], True)[: len(score_S)]
    tp = np.cumsum(hits[descending])[last_of_tie]
    fp = np.cumsum(errors[descending])[last_of_tie]
    return ConfidenceCurve(score_S[last_of_tie], *scores_of(tp, fp, num_gt - tp))


def size_rows(numbers: RunNumbers) -> list[SizeRow]:
    """Recall by the size of the objects and precision by the size of the predictions."""
    gts, preds = [image.gt for image in numbers.images], [image.pred for image in numbers.images]
    gt_size, pred_size = (
        size_classes(np.concatenate([objects.areas_N for objects in side])) for side in (gts, preds)
    )
    is_gt = np.concatenate([~gt.crowd_N for gt in gts])
    found, right, counted = [], [], []
    for gt, pred, match in zip(gts, preds, numbers.matches, strict=True):
        found.append(_flags(len(gt), [g for _, g, _ in match.pairs]))
        right.append(_flags(len(pred), [p for p, _, _ in match.pairs]))
        counted.append(~_flags(len(pred), list(match.ignored)))
    found_G, right_P, counted_P = (np.concatenate(flags) for flags in (found, right, counted))
    metrics = numbers.evaluation.coco.metrics
    rows = []
    for size, name in enumerate(SIZES):
        of_size_G, of_size_P = gt_size == size, pred_size == size
        rows.append(
            SizeRow(
                name=name,
                num_gt=int((of_size_G & is_gt).sum()),
                found=int((of_size_G & found_G).sum()),
                num_pred=int((of_size_P & counted_P).sum()),
                right=int((of_size_P & right_P).sum()),
                average_precision=defined(metrics[f"AP_{name}"]),
                average_recall=defined(metrics[f"AR_{name}"]),
            )
        )
    return rows


def class_rows(numbers: RunNumbers) -> list[ClassRow]:
    """Counts and AP of every description that is annotated or predicted; by objects annotated, then by name."""
    average_precision = numbers.evaluation.coco.per_category_ap()
    rows = [
        ClassRow(desc, counts, average_precision.get(desc))
        for desc, counts in numbers.evaluation.f1.at(MATCH_IOU).per_class.items()
    ]
    return sorted(rows, key=lambda row: (-(row.counts.tp + row.counts.fn), row.name))


def drop_reasons(numbers: RunNumbers) -> dict[str, int]:
    """What the parser and the scoring left out, by reason; most frequent first."""
    reasons: dict[str, int] = numbers.evaluation.metrics["drop_reasons"]
    return dict(sorted(reasons.items(), key=lambda item: -item[1]))


def _flags(size: int, indices: Sequence[int]) -> NDArray[np.bool_]:
    flags = np.zeros(size, dtype=bool)
    flags[list(indices)] = True
    return flags


def _steps(image: ImageResult) -> list[tuple[float, int, int]]:
    """(score, change of tp, change of fp) as the predictions are added from the most confident down.

    The largest one-to-one matching grows by one exactly where an augmenting path starts at the new prediction
    (Berge). With crowd regions it also matters which predictions stay unmatched: there every step is matched anew.
    """
    scores = image.pred.scores_N.tolist()
    order = sorted(range(len(scores)), key=lambda p: -scores[p])
    if image.gt.crowd_N.any():
        return _steps_with_crowd(image, order)
    feasible_PG = same_class_iou(image) >= MATCH_IOU
    owner: dict[int, int] = {}
    steps = []
    for p in order:
        hit = _augment(p, feasible_PG, owner, set())
        steps.append((scores[p], int(hit), int(not hit)))
    return steps


def _steps_with_crowd(image: ImageResult, order: Sequence[int]) -> list[tuple[float, int, int]]:
    pred = image.pred
    kept = [
        ImageResult(
            0, "", image.width, image.height, image.gt,
            Objects.of([pred.descs[p] for p in order[:count]], [pred.points[p] for p in order[:count]]),
        )
        for count in range(1, len(order) + 1)
    ]  # fmt: skip
    if not kept:
        return []
    counts_S3 = match_boxes(BoxSet.of(kept), (MATCH_IOU,)).counts_NT3[:, 0]
    changes_S3 = np.diff(counts_S3, axis=0, prepend=0).tolist()
    return [(float(pred.scores_N[p]), tp, fp) for p, (tp, fp, _) in zip(order, changes_S3, strict=True)]


def _augment(p: int, feasible_PG: np.ndarray, owner: dict[int, int], seen: set[int]) -> bool:
    """Give prediction p an object, moving earlier predictions to others where that is needed (Kuhn)."""
    for g in np.flatnonzero(feasible_PG[p]).tolist():
        if g in seen:
            continue
        seen.add(g)
        if g not in owner or _augment(owner[g], feasible_PG, owner, seen):
            owner[g] = p
            return True
    return False
