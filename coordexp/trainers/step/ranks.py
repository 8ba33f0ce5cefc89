"""The two things ranks agree on before a step: how many forwards it has, and what its losses are divided by."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def most_over_ranks(number: int, device: torch.device) -> int:
    """The largest `number` of all ranks. Collective when a process group is up."""
    if not is_distributed():
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest.item())


def sum_over_ranks(counts: Tensor) -> Tensor:
    """`counts` added up over all ranks, in place. Collective when a process group is up."""
    if is_distributed():
        dist.all_reduce(counts)
    return counts


def is_distributed() -> bool:
    """Is a process group up?"""
    return dist.is_available() and dist.is_initialized()
