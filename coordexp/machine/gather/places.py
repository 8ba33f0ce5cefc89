"""Folders, ports, memory and the hub."""

from __future__ import annotations

import importlib.util
import os
import socket
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from coordexp.machine.facts import HubFacts, MemoryFacts, PlaceFacts, PortFacts

PROBE_BYTES = 64 << 20
HUB_TIMEOUT_S = 5.0
_SHARED = Path("/dev/shm")
_GROUP = Path("/sys/fs/cgroup")


def gather_places(
    named: Iterable[tuple[str, Path, int]], *, probe_bytes: int = PROBE_BYTES
) -> tuple[PlaceFacts, ...]:
    """Space and speed of folders, each (use, path, bytes wanted there); one that does not exist is not made.

    Folders of one file system are written to once each: quotas and network mounts differ by folder.
    """
    found: dict[Path, PlaceFacts] = {}
    for use, path, wanted in named:
        folder = _existing(path)
        if folder in found:
            place = found[folder]
            found[folder] = replace(
                place, use=f"{place.use}, {use}", wanted_bytes=place.wanted_bytes + wanted
            )
        else:
            found[folder] = _place(use, path, folder, wanted, probe_bytes)
    return tuple(found.values())


def _existing(path: Path) -> Path:
    whole = path.expanduser().absolute()
    return next(folder for folder in (whole, *whole.parents) if folder.is_dir())


def _place(use: str, path: Path, folder: Path, wanted: int, probe_bytes: int) -> PlaceFacts:
    space = os.statvfs(folder)
    free = space.f_bavail * space.f_frsize
    inodes = space.f_favail if space.f_files else None
    speed, error = _write_speed(folder, min(probe_bytes, free // 2))
    return PlaceFacts(use, path, folder, wanted, free, inodes, speed, error)


def _write_speed(folder: Path, size: int) -> tuple[float, str | None]:
    """Bytes per second of a file that is removed again, and what went wrong."""
    probe = folder / f".coordexp-probe-{uuid.uuid4().hex}"
    block = os.urandom(1 << 20)
    started = time.perf_counter()
    try:
        with probe.open("xb", buffering=0) as stream:
            for _ in range(max(1, size >> 20)):
                stream.write(block)
            os.fsync(stream.fileno())
    except OSError as error:
        return 0.0, error.strerror or str(error)
    finally:
        probe.unlink(missing_ok=True)
    return max(1, size >> 20) * (1 << 20) / (time.perf_counter() - started), None


def gather_ports(named: Sequence[tuple[int, str, bool]]) -> tuple[PortFacts, ...]:
    """Whether somebody listens on ports of this machine, each (port, use, asked for)."""
    return tuple(PortFacts(port, use, _taken(port), asked) for port, use, asked in named)


def _taken(port: int) -> str | None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was closed just now is free
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.strerror or str(error)
    return None


def gather_memory(*, shared: Path = _SHARED, group: Path = _GROUP) -> MemoryFacts:
    """Of this machine and this process's control group."""
    total = free = None
    if shared.is_dir():
        space = os.statvfs(shared)
        total, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    limit, used = _limit(group)
    cores = float(len(os.sched_getaffinity(0)))
    quota = _quota(group)
    return MemoryFacts(
        total,
        free,
        limit,
        used,
        psutil.virtual_memory().available,
        cores if quota is None else min(cores, quota),
    )


def _limit(group: Path) -> tuple[int | None, int | None]:
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        text = _content(group / limit_name)
        if text.isdigit() and int(text) < psutil.virtual_memory().total:
            used = _content(group / used_name)
            return int(text), int(used) if used.isdigit() else 0
    return None, None


def _quota(group: Path) -> float | None:
    """Cores that the control group has a share of."""
    words = _content(group / "cpu.max").split()
    if len(words) == 2 and all(word.isdigit() for word in words):
        return int(words[0]) / int(words[1])
    return None


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def hub_folder() -> Path:
    """Where models of the hub are kept."""
    named = os.environ.get("HF_HOME")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"


def gather_hub(*, timeout_s: float = HUB_TIMEOUT_S) -> HubFacts:
    """Whether the hub of Hugging Face answers; any answer will do."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return HubFacts("", False, "the package huggingface_hub is not installed")
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return HubFacts(constants.ENDPOINT, offline=True)
    import requests

    started = time.perf_counter()
    try:
        requests.head(constants.ENDPOINT, timeout=timeout_s, allow_redirects=False)
    except requests.RequestException as error:
        host = urlsplit(constants.ENDPOINT).hostname or constants.ENDPOINT
        return HubFacts(
            constants.ENDPOINT, False, f"{host}: {type(error).__name__}", time.perf_counter() - started
        )
    return HubFacts(constants.ENDPOINT, False, None, time.perf_counter() - started)
