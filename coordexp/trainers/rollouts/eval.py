"""Evaluation on policy: every sample of a data set is answered, parsed and matched; counts are summed over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from coordexp.config.schema.rollout import EvalDetection, RolloutMatching
from coordexp.control.schedule import rollout_seed_base
from coordexp.data.raw_samples import RawSample
from coordexp.eval.coco.evaluate import ImageDetections
from coordexp.rollout.session.session import RolloutSession
from coordexp.telemetry.desc_monitor import DescCounts, DescMonitor
from coordexp.trainers.rollouts.answers import Answer, AnswerJudge
from coordexp.trainers.rollouts.eval_metrics import (
    CocoOutcome,
    RolloutEvalCounts,
    count_rollout,
    eval_metrics,
    image_detections,
    rollout_ap,
)


@dataclass(frozen=True)
class _Share:
    """What one rank found."""

    counts: RolloutEvalCounts
    desc: DescCounts
    images: list[ImageDetections]


def evaluate_rollouts(
    session: RolloutSession,
    judge: AnswerJudge,
    samples: Sequence[RawSample],
    settings: RolloutMatching,
    desc_monitor: DescMonitor | None = None,
    *,
    version: int,
    seed: int,
    step: int,
) -> dict[str, float]:
    """The `rollout/*` keys over all `samples`, each evaluated once, by one rank. Collective; equal on all ranks.

    version: of the policy the backend answers with.  seed, step: what seeds of sampled evaluations are made of.
    """
    share = _Share(RolloutEvalCounts(), DescCounts(), [])
    own = _part_of_rank(samples)
    first = own.first
    for chunk, rollouts in session.generate_all(
        own, version=version, seed_base=rollout_seed_base(seed, step), first_index=first
    ):
        answers = [
            judge(raw, rollout, gate=settings.eval_maskiou_gate)
            for raw, rollout in zip(chunk, rollouts, strict=True)
        ]
        share = _add(share, answers, first, settings, desc_monitor)
        first += len(chunk)
    shares = _gather(share)
    coco: CocoOutcome | None = None
    if settings.eval_detection.enabled:
        images = sorted((image for one in shares for image in one.images), key=lambda image: image.image_id)
        coco = rollout_ap(images, iou_type=settings.eval_detection.iou_type)
    return eval_metrics(
        sum((one.counts for one in shares), RolloutEvalCounts()),
        desc=None if desc_monitor is None else sum((one.desc for one in shares), DescCounts()),
        coco=coco,
        wanted=settings.eval_detection.metrics,
    )


@dataclass(frozen=True)
class _Stretch:
    """Some samples in a row, made when they are looked at."""

    samples: Sequence[RawSample]
    first: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.first

    def __getitem__(self, index: int, /) -> RawSample:
        return self.samples[self.first + index]


def _part_of_rank(samples: Sequence[RawSample]) -> _Stretch:
    """This rank's part of the data set."""
    is_distributed = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if is_distributed else (0, 1)
    start, stop = (len(samples) * part // world_size for part in (rank, rank + 1))
    return _Stretch(samples, start, stop)


def _add(
    share: _Share,
    answers: Sequence[Answer],
    first: int,
    settings: RolloutMatching,
    monitor: DescMonitor | None,
) -> _Share:
    counts = sum((count_rollout(a.parsed, a.match, len(a.raw.objects)) for a in answers), share.counts)
    images = share.images
    if settings.eval_detection.enabled:
        images = images + [
            detected_image(first + index, answer, settings.eval_detection)
            for index, answer in enumerate(answers)
        ]
    desc = share.desc
    if monitor is not None:
        pairs = matched_descs(answers)
        desc = desc + monitor.compare(pairs, max_pairs=len(pairs))
    return _Share(counts, desc, images)


def detected_image(image_id: int, answer: Answer, settings: EvalDetection) -> ImageDetections:
    """An answer as detection metrics take it, by `eval_detection.score_mode` and `strict_parse`."""
    raw, parsed = answer.raw, answer.parsed
    image = image_detections(image_id, (raw.width, raw.height), raw.objects, answer.rollout, parsed)
    is_broken = (
        parsed.truncated
        or parsed.invalid_rollout
        or parsed.dropped_invalid > 0
        or parsed.dropped_ambiguous > 0
    )
    if settings.strict_parse and is_broken:
        return replace(image, pred=[])
    if settings.score_mode == "constant":
        return replace(image, pred=[(desc, points, 1.0) for desc, points, _ in image.pred])
    return image


def matched_descs(answers: Sequence[Answer]) -> list[tuple[str, str]]:
    """(predicted, true) descriptions of all matched pairs."""
    return [
        (a.parsed.objects[pred].desc, a.raw.objects[gt].desc) for a in answers for pred, gt in a.match.matched
    ]


def _gather(share: _Share) -> list[_Share]:
    if not (dist.is_available() and dist.is_initialized()):
        return [share]
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, share)
    return shares
