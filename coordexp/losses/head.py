"""Objectives straight from hidden states: the logits of all supervised rows never exist at once.

The plain head makes logits [R, V] of the supervised rows and lets autograd keep them. The fused head takes
the rows in chunks and, because the objective's denominators are known before the forward, computes each
chunk's gradient while the chunk is still there:

    logits of the chunk -> per-row numbers (LossInputs) -> objective -> its gradient -> gradient of the
    logits, written over them -> added to the gradients of hidden states and head

Memory is one [chunk, V] buffer, and matrix products are as many as in the plain head (three). Both heads
give the same loss and gradients. The backward pass only scales what the forward computed, so it needs no
weights (they may be partitioned again by then), and works once, to first order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from coordexp.errors import ConfigError
from coordexp.losses.chunk_logits import ChunkLogits
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import LossInputs, LossNeeds, SupervisedRows

HeadMode = Literal["auto", "plain", "fused"]
Terms = TypeVar("Terms")
Objective = Callable[[LossInputs], tuple[Tensor, Terms]]
"""Maps the inputs of some rows to their share of the loss (0-dim) and detached terms that can be merged."""

CHUNK_BYTES = {"cpu": 80 * 2**20, "cuda": 512 * 2**20}
PLAIN_BYTES = 256 * 2**20
WEIGHT_GRAD_ROWS = 16_384


@dataclass(frozen=True)
class HeadProjection:
    """Logits of R rows as a sum of products: hidden @ weight^T and what adapters add to it."""

    hidden_RH: Tensor
    weight_VH: Tensor
    """May be tied to the input embedding."""
    bias_V: Tensor | None = None
    lora_Rr: Tensor | None = None
    """LoRA on the head: scaling * A(dropout(hidden)), with its own graph."""
    lora_weight_Vr: Tensor | None = None
    """LoRA on the head: the weight of B."""
    coord_offset_KH: Tensor | None = None
    """Added to the weight rows of the K coordinate tokens."""

    def logits(self, columns: CoordColumns) -> Tensor:
        """[R, V], by autograd operations."""
        logits_RV = F.linear(self.hidden_RH, self.weight_VH, self.bias_V)
        if self.lora_Rr is not None and self.lora_weight_Vr is not None:
            logits_RV = logits_RV + F.linear(self.lora_Rr, self.lora_weight_Vr)
        if self.coord_offset_KH is not None:
            offset_RK = F.linear(self.hidden_RH, self.coord_offset_KH).to(logits_RV.dtype)
            logits_RV = logits_RV.index_add(1, columns.index(logits_RV.device), offset_RK)
        return logits_RV

    def compute_dtype(self) -> torch.dtype:
        """The dtype matrix products run in: autocast's where it is on, else that of the hidden states."""
        device_type = self.hidden_RH.device.type
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return self.hidden_RH.dtype


def apply_head(
    projection: HeadProjection,
    rows: SupervisedRows,
    columns: CoordColumns,
    needs: LossNeeds,
    objective: Objective[Terms],
    *,
    mode: HeadMode = "auto",
    chunk_rows: int | None = None,
) -> tuple[Tensor, list[Terms]]:
    """Loss of the rows and the terms of each chunk (one for the plain head; none for no rows).

    Arguments:
        projection: hidden states of exactly `rows`, in their order, and the head.
        needs: what `objective` looks at.
        objective: see `Objective`; it must be a sum over rows (over boxes) divided by fixed counts.
        mode: `custom.head`; `auto` takes the fused head when the plain one needs more than PLAIN_BYTES.
        chunk_rows: rows per chunk of the fused head; default by CHUNK_BYTES.
    """
    if mode not in ("auto", "plain", "fused"):
        raise ConfigError(f"custom.head = {mode!r}: expected one of auto, plain, fused")
    if mode == "auto":
        logits_bytes = 4 * rows.num_rows * projection.weight_VH.shape[0]
        mode = "fused" if logits_bytes > PLAIN_BYTES else "plain"
    if mode == "fused":
        return fused_objective(projection, rows, columns, needs, objective, chunk_rows=chunk_rows)
    inputs = LossInputs.from_logits(projection.logits(columns), rows, columns, needs)
    loss, terms = objective(inputs)
    return loss, [terms]
