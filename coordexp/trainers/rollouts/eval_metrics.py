"""Evaluation by rollouts: the image results of all ranks become the `rollout/*` keys.

    images = [image_result(index, answer) for index, answer in enumerate(answers)]     # on every rank
    metrics = eval_metrics(images_of_all_ranks, settings, desc=...)                    # {"rollout/f1": ..., ...}

Keys carry their training names; whoever logs them adds `eval_`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from coordexp.codec.parse import ParsedObject
from coordexp.config.schema.rollout import EvalDetection, RolloutMatching
from coordexp.errors import CoordExpError
from coordexp.eval.box_matching import BoxSet
from coordexp.eval.coco.evaluate import DEFAULT_ENGINE, run_coco
from coordexp.eval.coco.from_images import coco_of
from coordexp.eval.detection import match_boxes
from coordexp.eval.on_policy import AnswerCounts
from coordexp.eval.predictions.artifacts import answer_errors
from coordexp.eval.predictions.confidence import ScoreFailure, mean_coord_logprob
from coordexp.eval.predictions.image_result import ImageResult, Objects, duplicate_rate, objects_of
from coordexp.metrics import keys_rollout as keys
from coordexp.metrics.keys_datasets import EVALUATION_BY_DATASET, dataset_key
from coordexp.telemetry.desc_monitor import DescCounts
from coordexp.trainers.rollouts.answers import JudgedAnswer

logger = logging.getLogger(__name__)


def image_result(image_id: int, answer: JudgedAnswer) -> ImageResult:
    """An answer as evaluation takes it.

    The score of a prediction is exp of the mean log-probability of its coordinates, and 1 for answers without
    log-probabilities.
    """
    raw, parsed, logprobs = answer.raw, answer.parsed, answer.rollout.token_logprobs
    return ImageResult(
        image_id=image_id,
        file_name="",
        width=raw.width,
        height=raw.height,
        gt=objects_of(raw.objects, raw.width, raw.height),
        pred=objects_of(
            parsed.objects,
            raw.width,
            raw.height,
            scores=[_score(obj, logprobs) for obj in parsed.objects],
        ),
        errors=answer_errors(parsed),
        match=answer.match,
    )


def eval_metrics(
    images: Sequence[ImageResult],
    settings: RolloutMatching,
    *,
    desc: DescCounts | None = None,
    parts: Sequence[str] = (),
) -> dict[str, float]:
    """The `rollout/*` keys of an evaluation, as plain numbers.

    Empty sets: precision is 1 when nothing was predicted, recall is 1 when there was nothing to find; a rate over no
    sample and a mean over no pair are left out.
    desc: None when the description monitor is off.
    parts: in a mixture the data set of each image; each data set then has its own numbers, too.
    """
    numbers = _answer_metrics(images, settings)
    for name in sorted(set(parts) - {""}):
        own = [image for image, part in zip(images, parts, strict=True) if part == name]
        of_part = _answer_metrics(own, settings)
        numbers |= {dataset_key(name, key): of_part[key] for key in EVALUATION_BY_DATASET if key in of_part}
    return numbers | ({} if desc is None else desc.values())


def _answer_metrics(images: Sequence[ImageResult], settings: RolloutMatching) -> dict[str, float]:
    counts = sum(map(AnswerCounts.of, images), AnswerCounts())
    objects = counts.objects
    metrics: dict[str, float] = {
        keys.PRECISION: objects.scores.precision,
        keys.RECALL: objects.scores.recall,
        keys.F1: objects.scores.f1,
        keys.PRED_OBJECTS: counts.num_pred,
        keys.GT_OBJECTS: counts.num_gt,
        keys.MATCHED: objects.tp,
        keys.FALSE_POSITIVES: objects.fp,
        keys.FALSE_NEGATIVES: objects.fn,
        keys.PARSE_DROPPED_INVALID: counts.dropped_invalid,
        keys.PARSE_DROPPED_AMBIGUOUS: counts.dropped_ambiguous,
    }
    if counts.num_images:
        metrics[keys.PARSE_TRUNCATED_RATE] = counts.num_truncated / counts.num_images
        metrics[keys.SAMPLE_VALID_PRED_RATE] = counts.num_with_pred / counts.num_images
        metrics[keys.SAMPLE_ANY_MATCH_RATE] = counts.num_with_match / counts.num_images
        rates = [duplicate_rate(image.pred) for image in images]
        metrics[keys.DUPLICATE_RATE_MEAN] = float(np.mean(rates))
        metrics[keys.DUPLICATE_RATE_P99] = float(np.percentile(rates, 99))
    if counts.num_matched:
        metrics[keys.MATCHED_MASKIOU_MEAN] = counts.maskiou_sum / counts.num_matched
    if settings.eval_detection.enabled:
        metrics |= detection_metrics(images, settings.eval_detection)
    return metrics


def detection_metrics(images: Sequence[ImageResult], settings: EvalDetection) -> dict[str, float]:
    """COCO AP and F1 (both over IoU 0.50:0.05:0.95), as far as `settings.metrics` asks for them.

    A failure is logged, not raised, as training goes on: it reports coco_eval_ok 0, mAP 0 (so that a checkpoint can
    still be chosen by it), and no F1.
    """
    metrics: dict[str, float] = {}
    problem = None if any(len(image.gt) for image in images) else "there is no ground truth"
    found = [_detected(image, settings) for image in images]
    if settings.metrics != "f1":
        metrics[keys.MAP] = 0.0
        try:
            if problem is None:
                coco = run_coco(*coco_of(found), iou_type=settings.iou_type, engine=DEFAULT_ENGINE)
                metrics[keys.MAP] = max(0.0, coco.metrics["AP"])
        except (CoordExpError, ValueError, ArithmeticError, LookupError) as error:
            problem = str(error)
    if settings.metrics != "coco" and problem is None:
        metrics[keys.F1_50_95] = match_boxes(BoxSet.of(found)).f1_50_95
    if problem is not None:
        logger.warning("Detection metrics of the rollouts failed, rollout/mAP is reported as 0: %s", problem)
    return metrics | {keys.COCO_EVAL_OK: float(problem is None)}


def _detected(image: ImageResult, settings: EvalDetection) -> ImageResult:
    """As detection metrics take it, by `score_mode` and `strict_parse`."""
    if settings.strict_parse and image.errors:  # cut off, no container, or with a broken object
        return replace(image, pred=Objects.of([], []))
    if settings.score_mode == "constant":
        return replace(image, pred=replace(image.pred, scores_N=np.ones(len(image.pred))))
    return image


def _score(obj: ParsedObject, logprobs: Sequence[float]) -> float:
    mean = mean_coord_logprob(obj.token_positions, logprobs, num_coords=len(obj.bins))
    if mean is ScoreFailure.MISSING_LOGPROBS:
        return 1.0
    return math.nan if isinstance(mean, ScoreFailure) else math.exp(mean)
