"""The key-value store of a launcher, over which ranks can talk before they have a process group."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from coordexp.errors import CoordExpError
from coordexp.trainers.start.meeting.facts import name_of

MEET_S = 60.0
"""Longest wait for the other ranks when a run starts."""
MEET_VARIABLE = "COORDEXP_MEET_S"
"""Environment variable with another number of seconds."""
_POLL_S = 0.1


class MeetingError(CoordExpError):
    """Ranks that do not come together."""


@dataclass(frozen=True)
class Launch:
    """What the launcher says of this process. has_store: the launcher keeps the store, else rank 0 does."""

    rank: int
    size: int
    host: str
    node: str
    address: str
    port: int
    has_store: bool
    attempt: str
    meet_s: float

    @property
    def name(self) -> str:
        """Of this rank, as errors call it."""
        return name_of(self.rank, self.host, self.node)


def launch_of(environ: Mapping[str, str]) -> Launch | None:
    """By the variables of torchrun and its like; None for a process alone."""
    size = int(environ.get("WORLD_SIZE") or 1)
    if size == 1 or "RANK" not in environ or not environ.get("MASTER_ADDR") or not environ.get("MASTER_PORT"):
        return None
    node = next(
        (environ[name] for name in ("GROUP_RANK", "NODE_RANK", "SLURM_NODEID") if environ.get(name)), ""
    )
    return Launch(
        rank=int(environ["RANK"]),
        size=size,
        host=socket.gethostname(),
        node=node,
        address=environ["MASTER_ADDR"],
        port=int(environ["MASTER_PORT"]),
        has_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        meet_s=float(environ.get(MEET_VARIABLE) or MEET_S),
    )


def open_store(launch: Launch) -> Any:
    """The store of the launch, of torch's kind, with keys of our own.

    Raises MeetingError where nobody answers in time, or where rank 0 cannot keep it.
    """
    import torch.distributed as dist

    keeps = launch.rank == 0 and not launch.has_store
    if not keeps:
        _wait_for_port(launch)
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            launch.address,
            launch.port,
            launch.size,
            keeps,
            timeout=timedelta(seconds=launch.meet_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        raise MeetingError(
            f"{launch.name} cannot {'listen on port' if keeps else 'reach'} "
            f"{launch.port if keeps else f'{launch.address}:{launch.port}'} for the other ranks "
            f"({str(error).splitlines()[0]}). Choose another MASTER_PORT, and let MASTER_ADDR name the host of rank 0."
        ) from error
    return dist.PrefixStore(f"coordexp/{launch.attempt}", store)  # type: ignore[attr-defined]


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition came true in time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(_POLL_S)
    return True


def _wait_for_port(launch: Launch) -> None:
    """torch fills the screen while it waits for a port; this waits quietly."""
    said: list[str] = []

    def is_open() -> bool:
        try:
            with socket.create_connection((launch.address, launch.port), timeout=5):
                return True
        except OSError as error:
            said[:] = [error.strerror or str(error)]
            return False

    if not wait_until(is_open, launch.meet_s):
        raise MeetingError(
            f"{launch.name}: nobody answers at {launch.address}:{launch.port}, where rank 0 is expected, for "
            f"{launch.meet_s:g} s ({said[0]}). Look at what rank 0 says; MASTER_ADDR must name its host as the other "
            f"nodes reach it, and the port must be open between them (process {os.getpid()})."
        )
