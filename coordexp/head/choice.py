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
from typing import Literal, TypeVar, get_args

from torch import Tensor

from coordexp.errors import ConfigError
from coordexp.head.fused import FUSED_DTYPES, FusedHead, Observer
from coordexp.head.liger import choose_kernel
from coordexp.head.projection import HeadProjection
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import LossInputs, LossNeeds, SupervisedRows

HeadMode = Literal["auto", "plain", "fused"]
Terms = TypeVar("Terms")
CHUNK_BYTES = {"cpu": 80 * 2**20, "cuda": 512 * 2**20}
"""Size of the logits buffer of the fused head, by device type."""
PLAIN_BYTES = 256 * 2**20
"""`auto` builds logits of up to this size in one piece."""


def apply_head(
    projection: HeadProjection,
    rows: SupervisedRows,
    columns: CoordColumns,
    needs: LossNeeds,
    objective: Callable[[LossInputs], tuple[Tensor, Terms]],
    *,
    mode: HeadMode = "auto",
    chunk_rows: int | None = None,
    observe: Observer | None = None,
    liger: bool = True,
) -> tuple[Tensor, list[Terms]]:
    """Loss of the rows, 0-dim, and the terms of each chunk (at least one; merge them).

    Arguments:
        projection: hidden states of exactly `rows`, in their order, and the head.
        needs: what `objective` looks at.
        objective: maps the inputs of some rows to their share of the loss and detached terms. It must be
            a sum over rows (or boxes) divided by counts that are known beforehand.
        mode: `custom.head`; `auto` takes the fused head when logits would exceed PLAIN_BYTES and their
            dtype is one of FUSED_DTYPES.
        chunk_rows: rows per chunk of the fused head; by default what fits in CHUNK_BYTES.
        observe: called with the logits [r, V] of each chunk and its rows, for metrics on whole rows; it may
            neither change nor keep the logits.
        liger: let liger-kernel serve the text rows where it can (`losses.liger_text`). The objective is then called
            twice on them, and must be linear in their cross-entropy.
    """
    if mode not in get_args(HeadMode):
        raise ConfigError(f"custom.head = {mode!r}: expected one of {', '.join(get_args(HeadMode))}")
    if _choose(mode, projection, rows, columns) == "fused":
        size = chunk_rows or default_chunk_rows(projection)
        kernel = choose_kernel(projection, needs, observe) if liger else None
        head = FusedHead(
            projection, rows, columns, needs, objective, chunk_rows=size, observe=observe, text_kernel=kernel
        )
        return head.loss(), head.terms
    logits_RV = projection.logits(columns)
    if observe is not None:
        observe(logits_RV.detach(), rows)
    loss, terms = objective(LossInputs.from_logits(logits_RV, rows, columns, needs))
    return loss, [terms]


def default_chunk_rows(projection: HeadProjection) -> int:
    """Rows whose float32 logits fit in CHUNK_BYTES: a multiple of 32, at least 32."""
    budget = CHUNK_BYTES.get(projection.hidden_RH.device.type, CHUNK_BYTES["cuda"])
    return max(budget // (4 * projection.vocab_size) // 32 * 32, 32)


def _choose(
    mode: HeadMode, projection: HeadProjection, rows: SupervisedRows, columns: CoordColumns
) -> HeadMode:
    if rows.num_rows == 0 or projection.vocab_size == columns.num_bins:
        return "plain"  # nothing to save
    if mode == "auto":
        is_large = 4 * rows.num_rows * projection.vocab_size > PLAIN_BYTES
        return "fused" if is_large and projection.compute_dtype() in FUSED_DTYPES else "plain"
    return mode
