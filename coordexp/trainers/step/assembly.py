"""Encoded samples -> the plan of a step: which samples share a forward, their tensors, and the totals of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from coordexp.codec.token_types import TokenType
from coordexp.control.controllers.bank import NO_KNOBS, Knobs
from coordexp.control.schedule import Channel
from coordexp.data.batch_meta import BatchMeta
from coordexp.data.raw_samples import RawSample
from coordexp.data.source import DatasetFilter
from coordexp.errors import ContractError
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import SupervisedRows
from coordexp.losses.modules import ForwardKind
from coordexp.losses.objective import Stage2Objective
from coordexp.metrics.keys_control import schedule_key
from coordexp.packing.choice import plan_packs
from coordexp.packing.layout import SampleBatch, pack_samples, pad_samples
from coordexp.packing.position_ids import VisionLayout
from coordexp.targets.counts import step_counts
from coordexp.targets.rows import slot_positions, stage2_rows
from coordexp.targets.sample import EncodedSample
from coordexp.trainers.rollouts.answers import RolledOut
from coordexp.trainers.rollouts.metrics import MetricEntries, packing_metrics
from coordexp.trainers.step.plan import PlannedForward, StepLoad, StepPlan

Agree = Callable[[int], int]
"""From this rank's number to the largest of all ranks; collective."""
Sum = Callable[[Tensor], Tensor]
"""Adds a tensor up over all ranks; collective."""


@dataclass(frozen=True)
class SampleLayout:
    """How samples become the tensors of a forward.

    packing_length: tokens of a packed sequence; None pads instead, `batch_size` samples a forward.
    mask_dtype: explicit attention mask of packs, see `pack_samples`.
    """

    columns: CoordColumns
    vision: VisionLayout
    pad_token_id: int
    packing_length: int | None
    batch_size: int
    mask_dtype: torch.dtype | None = None

    def groups(self, samples: Sequence[EncodedSample]) -> list[list[EncodedSample]]:
        """Samples that share a forward, in order; none is lost or repeated."""
        if self.packing_length is None:
            starts = range(0, len(samples), self.batch_size)
            return [list(samples[start : start + self.batch_size]) for start in starts]
        packs = plan_packs([sample.num_tokens for sample in samples], self.packing_length)
        return [[samples[index] for index in pack] for pack in packs]

    def forward(
        self, samples: Sequence[EncodedSample], typed: Collection[str] | None = None
    ) -> PlannedForward:
        """One forward over `samples`, on the host.

        typed: ids of the samples whose tokens get types for the token metrics; None types no row.
        """
        batch = (
            pad_samples(samples, self.vision, pad_token_id=self.pad_token_id)
            if self.packing_length is None
            else pack_samples(samples, self.vision, mask_dtype=self.mask_dtype)
        )
        rows = stage2_rows(batch.samples, batch.starts, self.columns)
        if typed is not None:
            rows = replace(rows, types_R=_types_of(batch, rows, typed))
        inputs = batch.model_inputs()
        inputs.pop("use_cache")  # the head sets it
        ids = tuple(sample.sample_id for sample in batch.samples)
        slots_N = slot_positions(batch.samples, batch.starts)
        return PlannedForward(inputs, BatchMeta(rows, ids, batch.num_samples), slots_N)


class StepAssembly:
    """Makes the plan of a step from the samples it teaches on. Collective: all ranks call it for the same step.

    Arguments:
        agree, add_up: over all ranks (see `trainers.step.ranks`).
        typed_datasets: whose samples token metrics split by type; None when they are off.
        device: of the totals.
    """

    def __init__(
        self,
        layout: SampleLayout,
        objective: Stage2Objective,
        *,
        agree: Agree,
        add_up: Sum,
        device: torch.device,
        typed_datasets: DatasetFilter | None = None,
    ) -> None:
        self.layout, self._objective = layout, objective
        self._agree, self._add_up, self._device = agree, add_up, device
        self._typed_datasets = typed_datasets

    def __call__(
        self,
        raws: Sequence[RawSample],
        samples: Sequence[EncodedSample],
        *,
        step: int,
        channel: Channel,
        kinds: tuple[ForwardKind, ...],
        filler: Callable[[], EncodedSample],
        rolled_out: RolledOut | None = None,
        knobs: Knobs = NO_KNOBS,
    ) -> StepPlan:
        """The plan of optimizer step `step` over `samples`, made of `raws`.

        filler: what a rank without any sample runs its fillers on; asked for only then.
        """
        typed = self._typed(raws)
        objective = self._objective.at(step, knobs)
        groups = self.layout.groups(samples)
        forwards = [self.layout.forward(group, typed) for group in groups]
        facts = {} if rolled_out is None else self._packing_facts(groups)
        in_force = self._objective.spec.in_force(step, knobs)
        facts = {**facts, **{schedule_key(*names): value for names, value in in_force.items()}}
        load = self._load(objective, forwards, kinds, groups, sum(len(raw.images) for raw in raws))
        totals = self._totals(objective, [forward.meta.rows for forward in forwards], kinds)
        wanted = max(1, self._agree(len(forwards)))
        if wanted < len(forwards):
            raise ContractError(f"{len(forwards)} forwards on this rank, but all ranks agreed on {wanted}.")
        if wanted > len(forwards):
            spare = forwards[-1] if forwards else self.layout.forward([filler()], typed)
            forwards += [replace(spare, is_filler=True)] * (wanted - len(forwards))
        return StepPlan(step, kinds, tuple(forwards), totals, channel, rolled_out, facts, load, knobs)

    def _typed(self, raws: Sequence[RawSample]) -> set[str] | None:
        counted = self._typed_datasets
        return None if counted is None else {raw.sample_id for raw in raws if counted(raw.dataset)}

    def _packing_facts(self, packs: Sequence[Sequence[EncodedSample]]) -> MetricEntries:
        if self.layout.packing_length is None:
            return {}
        lengths = [sum(sample.num_tokens for sample in pack) for pack in packs]
        return packing_metrics(lengths, self.layout.packing_length, num_segments=sum(map(len, packs)))

    def _load(
        self,
        objective: Stage2Objective,
        forwards: Sequence[PlannedForward],
        kinds: Sequence[ForwardKind],
        groups: Sequence[Sequence[EncodedSample]],
        num_images: int,
    ) -> StepLoad:
        length = self.layout.packing_length
        return StepLoad(
            num_supervised=sum(objective.num_supervised(forward.meta.rows, kinds) for forward in forwards),
            num_images=num_images,
            num_tokens=sum(sample.num_tokens for group in groups for sample in group),
            num_places=len(groups) * length
            if length is not None
            else sum(forward.inputs["input_ids"].numel() for forward in forwards),
            is_packed=length is not None,
        )

    def _totals(
        self, objective: Stage2Objective, rows: Sequence[SupervisedRows], kinds: Sequence[ForwardKind]
    ) -> Mapping[str, Tensor]:
        own: dict[str, Tensor] = {}
        for kind in kinds:
            own |= step_counts(rows, objective, kind)
        summed = self._add_up(torch.stack([count.double() for count in own.values()]).to(self._device))
        return dict(zip(own, summed.float().unbind(), strict=True))


def _types_of(batch: SampleBatch[EncodedSample], rows: SupervisedRows, typed: Collection[str]) -> Tensor:
    """int8 [R]: types of the rows' true tokens, IGNORE in samples whose ids are not in `typed`."""
    types = np.full(batch.input_ids_BT.numel(), TokenType.IGNORE, dtype=np.int8)
    for sample, start in zip(batch.samples, batch.starts, strict=True):
        if sample.sample_id in typed:
            types[start : start + sample.num_tokens] = sample.types_T
    return torch.from_numpy(types[rows.positions_R.numpy() + 1])  # row t predicts token t + 1
