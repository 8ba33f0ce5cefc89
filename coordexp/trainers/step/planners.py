"""What a step teaches on: functions of (raw samples of this rank, step) that return its plan.

plan_teacher_forced  batches that a data loader has made (stage 1)
GroundTruthPlanner   the annotations
RolloutPlanner       the model's own answers, with what they missed
ScheduledPlanner     one of the two, by the step's number alone
OneOfEachPlanner     each of the two in turn, for a dry run
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from coordexp.config.schema.training import B_RATIO, NUM_SOFTCTX
from coordexp.control.controllers.bank import NO_KNOBS, Knobs
from coordexp.control.controllers.share import AccumulatedShare
from coordexp.control.schedule import Channel, Points, channel_at, realized_b_ratio
from coordexp.data.batch_meta import BatchMeta
from coordexp.data.raw_samples import RawSample
from coordexp.losses.modules import ForwardKind
from coordexp.metrics.keys_stage2 import B_RATIO_REALIZED, STAGE2_CHANNEL_B
from coordexp.targets.builder import TargetBuilder
from coordexp.targets.sample import EncodedSample
from coordexp.trainers.rollouts.answers import RolledOut
from coordexp.trainers.step.assembly import StepAssembly
from coordexp.trainers.step.plan import PlannedForward, StepLoad, StepPlan

Totals = Mapping[str, Tensor | float]


class Planner(Protocol):
    """(raw samples of this rank, step, what controllers have in force) -> the plan of the step; collective."""

    def __call__(self, raws: Sequence[RawSample], step: int, knobs: Knobs = NO_KNOBS) -> StepPlan: ...


RollOut = Callable[[Sequence[RawSample], int], RolledOut]
"""(raw samples, step) -> the answers of the policy as it is at that step, and targets made of them; collective."""


TEXT, COORD = "text", "coord"
"""Totals of a stage-1 step: supervised text rows and coordinate rows."""


def plan_teacher_forced(
    batches: Sequence[dict[str, Any]],
    metas: Sequence[BatchMeta],
    step: int,
    add_up: Callable[[Tensor], Tensor],
    device: torch.device,
    packing_length: int | None = None,
    knobs: Knobs = NO_KNOBS,
) -> StepPlan:
    """The plan of a stage-1 step over collated batches. Collective.

    packing_length: of the packs they are made of, if any.
    """
    num_text = sum(meta.rows.num_text for meta in metas)
    num_coord = sum(meta.rows.num_coord for meta in metas)
    text, coord = add_up(torch.tensor([num_text, num_coord], device=device)).unbind()
    forwards = (PlannedForward(batch, meta) for batch, meta in zip(batches, metas, strict=True))
    load = _load_of_batches(metas, num_text + num_coord, packing_length)
    totals = {TEXT: text, COORD: coord}
    return StepPlan(step, (ForwardKind.TEACHER_FORCED,), tuple(forwards), totals, load=load, knobs=knobs)


def _load_of_batches(metas: Sequence[BatchMeta], num_supervised: int, packing_length: int | None) -> StepLoad:
    num_packs = sum(meta.num_packs for meta in metas)
    is_packed = packing_length is not None and num_packs > 0
    return StepLoad(
        num_supervised=num_supervised,
        num_images=sum(meta.num_images for meta in metas),
        num_tokens=sum(meta.num_tokens for meta in metas),
        num_places=num_packs * (packing_length or 0) if is_packed else sum(meta.num_places for meta in metas),
        is_packed=is_packed,
    )


class GroundTruthPlanner:
    """Channel A.

    Arguments:
        num_forwards: `stage2_ab.n_softctx_iter`; more than one and each planned forward runs as an anchor, with
            self-context behind it.
    """

    def __init__(self, builder: TargetBuilder, assemble: StepAssembly, *, num_forwards: int = 1) -> None:
        self._builder, self._assemble = builder, assemble
        self._num_forwards = num_forwards

    def __call__(self, raws: Sequence[RawSample], step: int, knobs: Knobs = NO_KNOBS) -> StepPlan:
        samples = [_ground_truth(self._builder, raw) for raw in raws]
        is_single = round(knobs.get(NUM_SOFTCTX, self._num_forwards)) == 1
        return self._assemble(
            raws,
            samples,
            step=step,
            channel=Channel.A,
            kinds=(ForwardKind.TEACHER_FORCED,)
            if is_single
            else (ForwardKind.ANCHOR, ForwardKind.SELF_CONTEXT),
            filler=_filler(self._builder, raws),
            knobs=knobs,
        )


class RolloutPlanner:
    """Channel B."""

    kinds = (ForwardKind.ROLLOUT,)

    def __init__(self, roll_out: RollOut, builder: TargetBuilder, assemble: StepAssembly) -> None:
        self._roll_out, self._builder, self._assemble = roll_out, builder, assemble

    def __call__(self, raws: Sequence[RawSample], step: int, knobs: Knobs = NO_KNOBS) -> StepPlan:
        rolled_out = self._roll_out(raws, step)
        return self._assemble(
            raws,
            rolled_out.samples,
            step=step,
            channel=Channel.B,
            kinds=self.kinds,
            filler=_filler(self._builder, raws),
            rolled_out=rolled_out,
            knobs=knobs,
        )


class ScheduledPlanner:
    """Channel A or B, as `stage2_ab.schedule` says for the step.

    share: what the steps so far have added up, where a controller moves the ratio.
    """

    def __init__(
        self,
        b_ratio: float | Points,
        ground_truth: Planner,
        rollouts: Planner,
        share: AccumulatedShare | None = None,
    ) -> None:
        self._b_ratio, self._share = b_ratio, share
        self._planners = {Channel.A: ground_truth, Channel.B: rollouts}

    def __call__(self, raws: Sequence[RawSample], step: int, knobs: Knobs = NO_KNOBS) -> StepPlan:
        if self._share is None or B_RATIO not in knobs:
            return self.plan(channel_at(step, self._b_ratio), raws, step, knobs)
        channel = self._share.next_channel(knobs[B_RATIO])
        return self.plan(channel, raws, step, knobs, self._share.realized())

    def plan(
        self,
        channel: Channel,
        raws: Sequence[RawSample],
        step: int,
        knobs: Knobs = NO_KNOBS,
        realized: float | None = None,
    ) -> StepPlan:
        """The plan of a step, whatever channel the schedule has for it.

        realized: share of channel B among the last steps; None: as the schedule has it.
        """
        plan = self._planners[channel](raws, step, knobs)
        facts = {
            STAGE2_CHANNEL_B: float(channel is Channel.B),
            B_RATIO_REALIZED: realized_b_ratio(step, self._b_ratio) if realized is None else realized,
        }
        return replace(plan, facts={**plan.facts, **facts})


class OneOfEachPlanner:
    """The channels one after another, for a dry run: the first step is of the first of `channels`."""

    def __init__(self, scheduled: ScheduledPlanner, channels: Sequence[Channel]) -> None:
        self._scheduled, self._channels = scheduled, channels

    def __call__(self, raws: Sequence[RawSample], step: int, knobs: Knobs = NO_KNOBS) -> StepPlan:
        return self._scheduled.plan(self._channels[step % len(self._channels)], raws, step)


def _ground_truth(builder: TargetBuilder, raw: RawSample) -> EncodedSample:
    return builder.from_ground_truth(raw.prompt_ids, raw.objects, sample_id=raw.sample_id, media=raw.media)


def _filler(builder: TargetBuilder, raws: Sequence[RawSample]) -> Callable[[], EncodedSample]:
    """The shortest target there is, an empty list of objects, for the shortest prompt of the rank."""

    def make() -> EncodedSample:
        raw = min(raws, key=lambda raw: len(raw.prompt_ids))
        return builder.from_ground_truth(raw.prompt_ids, (), sample_id=raw.sample_id, media=raw.media)

    return make
