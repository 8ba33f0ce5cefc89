"""What each atom of a loss does to the hidden states that the head turns into logits.

    gram_AA = torch.zeros(len(names), len(names), dtype=torch.float64)
    add_gram(gram_AA, head, hidden_RH, rows, columns, needs, losses)      # inside the head's call

The gradients themselves are never kept: of each chunk of rows only their inner products, which add up over rows,
forwards and ranks, and from which lengths and cosines follow. Training is left as it is: hidden states are copied out
of its graph, and random numbers that a head under dropout draws are put back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from coordexp.head.projection import projection_of
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import LossInputs, LossNeeds, SupervisedRows

AtomLosses = Callable[[LossInputs], Sequence[Tensor]]
"""Inputs of some rows -> what each atom adds to the step's loss there, 0-dim, always in the same order."""
HeadProbe = Callable[[nn.Module, Tensor], None]
"""Sees the head, whose weights can be read, and the hidden states [R, H] of the supervised rows."""
CHUNK_BYTES = 64 * 2**20
"""Size of the float32 logits that are looked at together."""


def add_gram(
    gram_AA: Tensor,
    head: nn.Module,
    hidden_RH: Tensor,
    rows: SupervisedRows,
    columns: CoordColumns,
    needs: LossNeeds,
    losses: AtomLosses,
) -> None:
    """Add the inner products of the atoms' gradients at `hidden_RH`, in place.

    gram_AA: float64 [A, A].  hidden_RH: of exactly `rows`, in their order.

    Raises ConfigError for a head that is no sum of products (quantised, DoRA).
    """
    devices = [] if hidden_RH.device.type == "cpu" else [hidden_RH.device]
    with torch.enable_grad(), torch.random.fork_rng(devices):
        for where, piece in rows.chunks(_chunk_rows(head, hidden_RH)):
            gradients_AX = _atom_gradients(head, hidden_RH[where], piece, columns, needs, losses)
            gram_AA += gradients_AX @ gradients_AX.T


def _atom_gradients(
    head: nn.Module,
    hidden_rH: Tensor,
    rows: SupervisedRows,
    columns: CoordColumns,
    needs: LossNeeds,
    losses: AtomLosses,
) -> Tensor:
    """float64 [A, r * H]: the gradient of each atom at the hidden states of some rows."""
    hidden_rH = hidden_rH.detach().requires_grad_()
    logits_rV = projection_of(head, hidden_rH).logits(columns)
    with torch.autocast(hidden_rH.device.type, enabled=False):
        found = losses(LossInputs.from_logits(logits_rV, rows, columns, needs))
    gradients = [
        torch.autograd.grad(loss, hidden_rH, retain_graph=True, allow_unused=True)[0]
        if loss.requires_grad
        else None
        for loss in found
    ]
    return torch.stack(
        [
            torch.zeros(hidden_rH.numel(), dtype=torch.float64, device=hidden_rH.device)
            if gradient is None
            else gradient.double().flatten()
            for gradient in gradients
        ]
    )


def _chunk_rows(head: nn.Module, hidden_RH: Tensor) -> int:
    """Rows whose float32 logits fit in CHUNK_BYTES; at least a box."""
    return max(CHUNK_BYTES // (4 * projection_of(head, hidden_RH[:0]).vocab_size), 4)
