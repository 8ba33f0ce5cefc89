"""Evaluation by rollouts: counts of every sample, added up over the set and all ranks, and the keys drawn from them.

    counts = sum((count_rollout(parsed, match, len(gts)) for ...), RolloutEvalCounts())
    metrics = eval_metrics(counts_of_all_ranks, desc=..., mean_ap=...)       # {"rollout/f1": ..., ...}

Keys carry their training names; whoever logs them adds `eval_`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from coordexp.codec.parse import ParsedRollout
from coordexp.codec.schema import BoxObject
from coordexp.errors import CoordExpError
from coordexp.eval.coco.evaluate import ImageDetections
from coordexp.eval.detection import Counts
from coordexp.eval.online import map_of
from coordexp.geometry import dequantize_points
from coordexp.matching import MatchResult
from coordexp.metrics import keys_rollout as keys
from coordexp.rollout.types import Rollout
from coordexp.telemetry.desc_monitor import DescCounts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RolloutEvalCounts:
    """Sums over samples; add those of several samples or ranks with `+`."""

    num_samples: int = 0
    num_truncated: int = 0
    num_with_valid_pred: int = 0
    num_with_match: int = 0
    pred_objects: int = 0
    gt_objects: int = 0
    matched: int = 0
    dropped_invalid: int = 0
    dropped_ambiguous: int = 0
    maskiou_sum: float = 0.0

    def __add__(self, other: RolloutEvalCounts) -> RolloutEvalCounts:
        return RolloutEvalCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def count_rollout(parsed: ParsedRollout, match: MatchResult, num_gt: int) -> RolloutEvalCounts:
    """The counts of one sample. match: of `parsed.objects` with the record's `num_gt` objects."""
    return RolloutEvalCounts(
        num_samples=1,
        num_truncated=int(parsed.truncated),
        num_with_valid_pred=int(bool(parsed.objects)),
        num_with_match=int(bool(match.matched)),
        pred_objects=len(parsed.objects),
        gt_objects=num_gt,
        matched=len(match.matched),
        dropped_invalid=parsed.dropped_invalid,
        dropped_ambiguous=parsed.dropped_ambiguous,
        maskiou_sum=match.maskiou_sum,
    )


@dataclass(frozen=True)
class CocoOutcome:
    """COCO AP and F1 (both over IoU 0.50:0.05:0.95) of the rollouts; None when they could not be computed."""

    mean_ap: float | None
    mean_f1: float | None = None


def eval_metrics(
    counts: RolloutEvalCounts,
    *,
    desc: DescCounts | None = None,
    coco: CocoOutcome | None = None,
    wanted: str = "coco",
) -> dict[str, float]:
    """The `rollout/*` keys of an evaluation, as plain numbers.

    Empty sets: precision is 1 when nothing was predicted, recall is 1 when there was nothing to find; a rate over no
    sample and a mean over no pair are left out.
    desc: None when the description monitor is off.  coco: None when `eval_detection` is off; a failed evaluation
    reports mAP 0 with coco_eval_ok 0, and no F1.  wanted: `eval_detection.metrics`.
    """
    scores = Counts(
        counts.matched, counts.pred_objects - counts.matched, counts.gt_objects - counts.matched
    ).scores
    metrics: dict[str, float] = {
        keys.PRECISION: scores.precision,
        keys.RECALL: scores.recall,
        keys.F1: scores.f1,
        keys.PRED_OBJECTS: counts.pred_objects,
        keys.GT_OBJECTS: counts.gt_objects,
        keys.MATCHED: counts.matched,
        keys.FALSE_POSITIVES: counts.pred_objects - counts.matched,
        keys.FALSE_NEGATIVES: counts.gt_objects - counts.matched,
        keys.PARSE_DROPPED_INVALID: counts.dropped_invalid,
        keys.PARSE_DROPPED_AMBIGUOUS: counts.dropped_ambiguous,
    }
    if counts.num_samples:
        metrics[keys.PARSE_TRUNCATED_RATE] = counts.num_truncated / counts.num_samples
        metrics[keys.SAMPLE_VALID_PRED_RATE] = counts.num_with_valid_pred / counts.num_samples
        metrics[keys.SAMPLE_ANY_MATCH_RATE] = counts.num_with_match / counts.num_samples
    if counts.matched:
        metrics[keys.MATCHED_MASKIOU_MEAN] = counts.maskiou_sum / counts.matched
    if coco is not None:
        metrics[keys.COCO_EVAL_OK] = float(coco.mean_ap is not None)
        if wanted != "f1":
            metrics[keys.MAP] = 0.0 if coco.mean_ap is None else coco.mean_ap
        if wanted != "coco" and coco.mean_f1 is not None:
            metrics[keys.F1_50_95] = coco.mean_f1
    return metrics | ({} if desc is None else desc.values())


def image_detections(
    image_id: int,
    size: tuple[int, int],
    gts: Sequence[BoxObject],
    rollout: Rollout,
    parsed: ParsedRollout,
) -> ImageDetections:
    """One image of `rollout_ap`, in pixels.

    size: width and height of the image.  The score of a prediction is exp of the mean log-probability of its
    coordinate tokens, and 1 for rollouts without log-probabilities.
    """
    return ImageDetections(
        image_id=image_id,
        width=size[0],
        height=size[1],
        gt=[(gt.desc, _pixels(gt.bins, size)) for gt in gts],
        pred=[
            (pred.desc, _pixels(pred.bins, size), _score(pred.token_positions, rollout.token_logprobs))
            for pred in parsed.objects
        ],
    )


def rollout_ap(images: Sequence[ImageDetections], *, iou_type: str = "bbox") -> CocoOutcome:
    """COCO AP over the images of all ranks, by the code of `coordexp eval`.

    A failure is logged, never raised: training goes on.
    """
    try:
        numbers = map_of(images, iou_type=iou_type)
    except (CoordExpError, ValueError, ArithmeticError, LookupError) as error:
        logger.warning("COCO evaluation of the rollouts failed, rollout/mAP is reported as 0: %s", error)
        return CocoOutcome(None)
    if numbers["AP"] < 0:
        logger.warning("COCO evaluation of the rollouts found no ground truth; rollout/mAP is reported as 0.")
        return CocoOutcome(None)
    return CocoOutcome(numbers["AP"], numbers["f1_50_95"])


def _pixels(bins: Sequence[int], size: tuple[int, int]) -> list[float]:
    points = dequantize_points([bins[at : at + 2] for at in range(0, len(bins), 2)], *size)
    return [float(value) for value in points.ravel()]


def _score(positions: Sequence[int], logprobs: Sequence[float]) -> float:
    if not logprobs:
        return 1.0
    return math.exp(sum(logprobs[at] for at in positions) / len(positions))
