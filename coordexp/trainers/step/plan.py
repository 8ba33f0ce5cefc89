"""The forwards of one optimizer step, decided before the first of them.

The HF Trainer asks for all micro-batches of a step at once and then runs them one by one. A `StepPlan` answers with as
many entries as it was asked for; an entry holds any number of forwards. All ranks run equally many forwards (under
ZeRO-3 every forward is collective): a rank with fewer repeats its last one with weight 0.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from coordexp.codec.token_types import TokenType
from coordexp.errors import ContractError
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import SupervisedRows
from coordexp.packing.choice import plan_packs
from coordexp.packing.layout import SampleBatch, pack_samples, pad_samples
from coordexp.packing.position_ids import VisionLayout
from coordexp.targets.rows import stage2_rows
from coordexp.targets.sample import EncodedSample


@dataclass(frozen=True, eq=False)
class PlannedForward:
    """One forward: whole samples, their supervised rows, and whether it counts.

    counts: False for a forward that only keeps ranks in step; its loss is multiplied by 0.
    """

    batch: SampleBatch[EncodedSample]
    rows: SupervisedRows
    counts: bool = True


@dataclass(frozen=True)
class Layout:
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

    def forward(self, samples: Sequence[EncodedSample]) -> PlannedForward:
        """The tensors of one forward over `samples`, on the host."""
        if self.packing_length is None:
            batch = pad_samples(samples, self.vision, pad_token_id=self.pad_token_id)
        else:
            batch = pack_samples(samples, self.vision, mask_dtype=self.mask_dtype)
        return PlannedForward(batch, stage2_rows(batch.samples, batch.starts, self.columns))


def plan_forwards(
    groups: Sequence[Sequence[EncodedSample]],
    layout: Layout,
    agree: Callable[[int], int],
    *,
    filler: EncodedSample,
) -> list[PlannedForward]:
    """The forwards of a rank, one per group of samples (`Layout.groups`) and at least one.

    agree: from this rank's number of forwards to that of the rank with most (see `most_over_ranks`).
    filler: what a rank without any sample runs its zero-weight forwards on.
    """
    forwards = [layout.forward(group) for group in groups]
    wanted = max(1, agree(len(forwards)))
    if wanted < len(forwards):
        raise ContractError(f"{len(forwards)} forwards on this rank, but all ranks agreed on {wanted}.")
    spare = replace(forwards[-1] if forwards else layout.forward([filler]), counts=False)
    return forwards + [spare] * (wanted - len(forwards))


def with_token_types(forward: PlannedForward, typed: Collection[str]) -> PlannedForward:
    """The forward with the types of its rows' true tokens, IGNORE in samples whose ids are not in `typed`."""
    types = np.full(forward.batch.input_ids_BT.numel(), TokenType.IGNORE, dtype=np.int8)
    for sample, start in zip(forward.batch.samples, forward.batch.starts, strict=True):
        if sample.sample_id in typed:
            types[start : start + sample.num_tokens] = sample.types_T
    types_R = torch.from_numpy(types[forward.rows.positions_R.numpy() + 1])  # row t predicts token t + 1
    return replace(forward, rows=replace(forward.rows, types_R=types_R))


def spread(forwards: Sequence[PlannedForward], num_entries: int) -> list[list[PlannedForward]]:
    """The forwards in order, over `num_entries` entries; only the first entries can be empty, never the last."""
    if num_entries < 1 or not forwards:
        raise ContractError(
            f"{len(forwards)} forwards over {num_entries} entries; expected at least one of each."
        )
    cuts = [index * len(forwards) // num_entries for index in range(num_entries + 1)]
    return [list(forwards[start:stop]) for start, stop in pairwise(cuts)]


def most_over_ranks(number: int, device: torch.device) -> int:
    """The largest `number` of all ranks. Collective when a process group is up."""
    if not (dist.is_available() and dist.is_initialized()):
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest.item())


def on_device(rows: SupervisedRows, device: torch.device) -> SupervisedRows:
    """The rows with all their tensors on `device`."""

    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, non_blocking=True)

    return replace(
        rows,
        positions_R=rows.positions_R.to(device, non_blocking=True),
        targets_R=rows.targets_R.to(device, non_blocking=True),
        bins_N=rows.bins_N.to(device, non_blocking=True),
        roles_R=move(rows.roles_R),
        dropped_invalid_R=move(rows.dropped_invalid_R),
        types_R=move(rows.types_R),
    )
