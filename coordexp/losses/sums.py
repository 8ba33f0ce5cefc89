"""`SumCount`: the one return type of every loss atom."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class SumCount(NamedTuple):
    """A sum over terms and how many terms there were, both 0-dim tensors of one device; of several sums, vectors.

    `count` is a float so that it can also be a total weight. An atom over no rows has sum 0, still
    connected to the graph, and count 0.
    """

    sum: Tensor
    count: Tensor  # type: ignore[assignment]  # shadows tuple.count on purpose: the field's word

    def mean(self) -> Tensor:
        """sum / count; 0 where count is 0. No host sync."""
        return divide(self.sum, self.count)

    def detach(self) -> SumCount:
        """The same numbers outside the graph."""
        return SumCount(self.sum.detach(), self.count)


def sum_count(values: Tensor) -> SumCount:
    """Sum over all elements of `values`, and their number."""
    return SumCount(values.sum(), torch.full((), values.numel(), dtype=values.dtype, device=values.device))


def add_up(parts: Iterable[SumCount]) -> SumCount:
    """Sums and counts of several pieces of one atom added up, entry by entry. Needs at least one piece."""
    sums, counts = zip(*parts, strict=True)
    return SumCount(torch.stack(sums).sum(0), torch.stack(counts).sum(0))


def divide(total: Tensor, count: Tensor | float) -> Tensor:
    """total / count, and total (which is then 0) where count is 0. `count` may live on the device."""
    if isinstance(count, Tensor):
        return total / torch.where(count == 0, torch.ones_like(count), count)
    return total / (count or 1)


def math_dtype(x: Tensor) -> Tensor:
    """`x` in the dtype losses are computed in: float32, or float64 if it already is."""
    return x if x.dtype == torch.float64 else x.float()
