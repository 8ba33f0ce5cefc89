"""How much memory this process has used, and how much there is: of its CUDA device, else of the host."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass

import torch

GIB = 2.0**30
HOST = "host, resident"
"""Where memory is that is no device's."""


@dataclass(frozen=True)
class MemoryUse:
    """peak_gib: largest use since the run began (or, on CUDA, since `take`).  total_gib: what there is.

    where: in words.
    """

    peak_gib: float
    total_gib: float
    where: str


def take(device: torch.device) -> MemoryUse:
    """What was used; on CUDA the allocator's peak begins anew. On a CPU it is the process's largest resident set."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        properties = torch.cuda.get_device_properties(device)
        return MemoryUse(peak / GIB, properties.total_memory / GIB, properties.name)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return MemoryUse(peak / GIB, _host_bytes() / GIB, HOST)


def _host_bytes() -> int:
    """Of the machine, or what this process may map where that is limited."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return physical if limit == resource.RLIM_INFINITY else min(physical, limit)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch's CPU allocator raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
