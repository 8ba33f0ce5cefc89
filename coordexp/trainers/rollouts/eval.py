"""Evaluation on policy: every sample of a data set is answered, parsed and matched by one rank.

The image results of all ranks meet on the main process, which computes the numbers once and hands them to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from coordexp.config.schema.rollout import RolloutMatching
from coordexp.control.schedule import rollout_seed_base
from coordexp.data.raw_samples import RawSample
from coordexp.errors import RolloutError
from coordexp.eval.predictions.image_result import ImageResult
from coordexp.rollout.session.session import RolloutSession
from coordexp.telemetry.desc_monitor import DescCounts, DescMonitor
from coordexp.trainers.rollouts.answers import AnswerJudge, JudgedAnswer
from coordexp.trainers.rollouts.eval_metrics import eval_metrics, image_result


@dataclass(frozen=True)
class _Share:
    """What one rank found. parts: the data set of a mixture that each image belongs to."""

    images: list[ImageResult]
    parts: list[str]
    desc: DescCounts


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
    watch: Callable[[JudgedAnswer], None] | None = None,
) -> dict[str, float]:
    """The `rollout/*` keys over all `samples`, each evaluated once, by one rank. Collective; equal on all ranks.

    In a mixture also `dataset/<name>/rollout/*` of every data set.

    version: of the policy the backend answers with.  seed, step: what seeds of sampled evaluations are made of.
    watch: called with each answer of this rank, in the order of the samples.
    """
    images: list[ImageResult] = []
    parts: list[str] = []
    desc = DescCounts()
    own = _part_of_rank(samples)
    for chunk, rollouts in session.generate_all(
        own, version=version, seed_base=rollout_seed_base(seed, step), first_index=own.first
    ):
        answers = [
            judge(raw, rollout, gate=settings.eval_maskiou_gate)
            for raw, rollout in zip(chunk, rollouts, strict=True)
        ]
        if watch is not None:
            for answer in answers:
                watch(answer)
        images += [
            image_result(own.first + index, answer) for index, answer in enumerate(answers, start=len(images))
        ]
        parts += [raw.part for raw in chunk]
        if desc_monitor is not None:
            pairs = matched_descs(answers)
            desc = desc + desc_monitor.compare(pairs, max_pairs=len(pairs))
    return _on_main(
        _Share(images, parts, desc),
        lambda shares: eval_metrics(
            [image for share in shares for image in share.images],
            settings,
            desc=None if desc_monitor is None else sum((share.desc for share in shares), DescCounts()),
            parts=[part for share in shares for part in share.parts],
        ),
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
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if _is_distributed() else (0, 1)
    start, stop = (len(samples) * part // world_size for part in (rank, rank + 1))
    return _Stretch(samples, start, stop)


def matched_descs(answers: Sequence[JudgedAnswer]) -> list[tuple[str, str]]:
    """(predicted, true) descriptions of all matched pairs."""
    return [
        (a.parsed.objects[pred].desc, a.raw.objects[gt].desc) for a in answers for pred, gt in a.match.matched
    ]


def _on_main(share: _Share, numbers_of: Callable[[Sequence[_Share]], dict[str, float]]) -> dict[str, float]:
    """Numbers from the shares of all ranks, computed once, on the main process; its error is raised on every rank."""
    if not _is_distributed():
        return numbers_of([share])
    is_main = dist.get_rank() == 0
    shares: list[Any] | None = [None] * dist.get_world_size() if is_main else None
    dist.gather_object(share, shares)
    sent: list[Any] = [None]
    if shares is not None:
        try:
            sent = [numbers_of(shares)]
        except Exception as error:
            sent = [f"{type(error).__name__}: {error}"]
            dist.broadcast_object_list(sent)
            raise
    dist.broadcast_object_list(sent)
    if isinstance(sent[0], str):
        raise RolloutError(f"the evaluation failed on the main process ({sent[0]}).")
    numbers: dict[str, float] = sent[0]
    return numbers


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
