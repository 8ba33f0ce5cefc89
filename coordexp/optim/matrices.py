"""Muon where its matrices lie in flat memory: a projection that holds several, or a rank's partition of a ZeRO group.

`torch.optim.Muon` makes the update; only the momentum, which knows no shapes, is kept flat.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Matrix:
    """Where a matrix lies in a group of matrices laid out one after the other, in elements."""

    start: int
    rows: int
    columns: int

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.columns


@dataclass(frozen=True)
class FlatMatrices:
    """A piece of flat memory and the matrices it belongs to.

    matrices: all of the group.  start, size: of the piece that this rank has.  ranks: who has the other pieces, all of
    this size, in their order; None where the piece is all.
    """

    matrices: tuple[Matrix, ...]
    start: int
    size: int
    ranks: dist.ProcessGroup | None = None

    @property
    def stop(self) -> int:
        return self.start + self.size

    def is_cut(self, matrix: Matrix) -> bool:
        """Do several ranks have a share of it?"""
        return matrix.start // self.size != (matrix.stop - 1) // self.size


def stacked(parameter: Tensor, pieces: int) -> FlatMatrices:
    """A parameter [pieces * rows, columns] as `pieces` matrices."""
    rows, columns = parameter.shape[0] // pieces, parameter.shape[1]
    matrices = tuple(Matrix(i * rows * columns, rows, columns) for i in range(pieces))
    return FlatMatrices(matrices, 0, parameter.numel())


@torch.no_grad()
def muon_step(
    parameter: nn.Parameter, state: MutableMapping[str, Any], group: Mapping[str, Any], layout: FlatMatrices
) -> None:
    """What `torch.optim.Muon` does to each matrix, on the share of this rank.

    A matrix that lies on one rank is updated there. The shares of one that is cut meet in an all-reduce, which all
    ranks join. Nothing is done without a gradient (all ranks have one, or none has).

    Args:
        parameter: contiguous, of `layout.size` elements in any shape; with its gradient.
        state: of the parameter; holds `momentum_buffer`, in its shape.
        group: options of `torch.optim.Muon`.
    """
    if parameter.grad is None:
        return
    momentum, grad = group["momentum"], parameter.grad
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(grad)
    buffer = state["momentum_buffer"]
    buffer.lerp_(grad, 1 - momentum)
    update = (grad.lerp(buffer, momentum) if group["nesterov"] else buffer).reshape(-1)
    weights = parameter.detach().view(-1)
    for matrix in layout.matrices:
        first, last = max(matrix.start, layout.start), min(matrix.stop, layout.stop)
        here = slice(first - layout.start, last - layout.start)
        has_share = first < last
        if not layout.is_cut(matrix):
            if has_share:
                _step_of_one(weights[here], update[here], matrix, group)
            continue
        there = slice(first - matrix.start, last - matrix.start)
        whole, old = update.new_zeros(matrix.rows * matrix.columns), None
        if has_share:
            whole[there] = update[here]
        dist.all_reduce(whole, group=layout.ranks)  # of disjoint shares and zeros: exact
        if has_share:
            old = torch.zeros_like(whole, dtype=weights.dtype)
            old[there] = weights[here]
            _step_of_one(old, whole, matrix, group)
            weights[here] = old[there]


def _step_of_one(weights: Tensor, update: Tensor, matrix: Matrix, group: Mapping[str, Any]) -> None:
    """One step of Muon on a matrix in place, from its update before orthogonalization (hence no momentum here)."""
    one = nn.Parameter(weights.view(matrix.rows, matrix.columns))
    one.grad = update.view(matrix.rows, matrix.columns)
    options = {key: group[key] for key in OPTIONS}
    torch.optim.Muon([one], **options, momentum=0.0, nesterov=False).step()


OPTIONS = ("lr", "weight_decay", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
"""Of a group of Muon, all but those of its momentum."""
