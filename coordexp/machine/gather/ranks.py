"""Do the ranks of a launcher (torchrun) meet, sum right, and have the same versions?"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from coordexp.machine.facts import RankFacts

MEET_S = 60
"""Longest wait for the other ranks, and for an answer of theirs."""
_NUMBERS = 1 << 22  # of four bytes
_ROUNDS = 3


def world_size() -> int:
    """How many ranks a launcher has started, this one included; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """Of this process."""
    return int(os.environ.get("RANK") or 0)


def gather_ranks(versions: Mapping[str, str | None], *, meet_s: float = MEET_S) -> RankFacts | None:
    """What the ranks do together; all of them call it. None for a process alone."""
    size = world_size()
    if size == 1:
        return None
    os.environ.setdefault(
        "TORCH_NCCL_BLOCKING_WAIT", "1"
    )  # so that a lost rank is an error and no endless wait
    import torch
    import torch.distributed as dist

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    started = time.perf_counter()
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=meet_s))
        dist.barrier()
        met_s = time.perf_counter() - started
        told: list[Any] = [None] * size
        dist.all_gather_object(told, (socket.gethostname(), dict(versions)))
        wrong, bytes_per_s = _sum_together(device, size)
    except (RuntimeError, ValueError) as error:
        return RankFacts(size, backend, str(error).splitlines()[0])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    hosts = tuple(sorted({host for host, _ in told}))
    return RankFacts(size, backend, wrong, met_s, bytes_per_s, hosts, differing([found for _, found in told]))


def differing(versions: Sequence[Mapping[str, str | None]]) -> dict[str, tuple[str, ...]]:
    """Packages whose version is not the same everywhere, with the versions there are."""
    found = {
        package: tuple(sorted({of_rank.get(package) or "none" for of_rank in versions}))
        for package in versions[0]
    }
    return {package: different for package, different in found.items() if len(different) > 1}


def _sum_together(device: Any, size: int) -> tuple[str | None, float]:
    """What is wrong with a sum over all ranks, and how fast it is."""
    import torch
    import torch.distributed as dist

    numbers = torch.empty(_NUMBERS, device=device)
    seconds = []
    for _ in range(_ROUNDS):
        numbers.fill_(rank() + 1.0)
        started = time.perf_counter()
        dist.all_reduce(numbers)
        found = numbers[[0, -1]].tolist()  # waits for the device
        seconds.append(time.perf_counter() - started)
    expected = size * (size + 1) / 2
    wrong = None if found == [expected, expected] else f"the sum over the ranks is {found[0]}, not {expected}"
    return wrong, numbers.numel() * numbers.element_size() / min(seconds)
