"""What a training step knows of a batch beside the model's inputs: one record, made where the batch is made."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from coordexp.losses.inputs import SupervisedRows

META_KEY = "coordexp"
"""Where a collated batch carries it."""


@dataclass(frozen=True, eq=False)
class BatchMeta:
    """Supervised rows of one forward, and the samples it is made of."""

    rows: SupervisedRows
    """With token types where they are asked for."""
    sample_ids: tuple[str, ...]
    """`FILE:LINE` of every sample."""
    num_samples: int
    """Original samples: more than sequences in a pack."""
    types_skipped: bool = False
    """Token types were asked for, but the batch's labels are not those of its samples one after another."""
    num_replaced: int = 0
    """Samples that stand in for others, which could not be encoded."""
    parts: tuple[str, ...] = ()
    """The data set of a mixture that each sample was drawn from; empty names without one."""
    num_images: int = 0
    """Pictures of all samples."""
    num_tokens: int = 0
    """Tokens of all samples, padding not counted."""
    num_places: int = 0
    """Tokens of the batch, padding counted."""
    num_packs: int = 0
    """Packs it is made of; 0 where samples do not come in packs."""
    ends: tuple[tuple[int, int], ...] = ()
    """Of every entry that the data loader took, a sample or a pack: the place of the batch, and the number of samples,
    at which it ends."""

    @property
    def num_entries(self) -> int:
        """Entries that the data loader took."""
        return len(self.ends)

    def first(self, num_entries: int) -> tuple[BatchMeta, Tensor]:
        """Supervision of the first entries alone, and which rows (bool [R]) that is. Sizes stay those of the batch."""
        place, num_samples = self.ends[num_entries - 1]
        keep_R = self.rows.positions_R < place
        kept = replace(
            self,
            rows=self.rows.where(keep_R),
            sample_ids=self.sample_ids[:num_samples],
            num_samples=num_samples,
            parts=self.parts[:num_samples],
            ends=self.ends[:num_entries],
        )
        return kept, keep_R

    def put(self, batch: dict[str, Any]) -> None:
        """Into a batch, as plain containers: data loaders move tensors in those to the device, and nothing else."""
        batch[META_KEY] = _plain(self) | {"rows": _plain(self.rows)}

    @classmethod
    def take(cls, batch: dict[str, Any]) -> BatchMeta:
        """Out of a batch, on whatever device it is by now."""
        plain = batch.pop(META_KEY)
        return cls(**(plain | {"rows": SupervisedRows(**plain["rows"])}))

    @classmethod
    def of(cls, batch: dict[str, Any]) -> BatchMeta:
        """The record of a batch that keeps it."""
        return cls.take(dict(batch))

    def on(self, device: torch.device) -> BatchMeta:
        """The same with all tensors on `device`."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self.rows)
            if isinstance(value := getattr(self.rows, field.name), Tensor)
        }
        return replace(self, rows=replace(self.rows, **moved))


def _plain(record: Any) -> dict[str, Any]:
    """Fields of a dataclass by name, one level deep."""
    return {field.name: getattr(record, field.name) for field in fields(record)}
