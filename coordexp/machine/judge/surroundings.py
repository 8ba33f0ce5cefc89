"""Ports, folders, memory, the hub, TMPDIR."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from coordexp.machine.facts import HubFacts, MemoryFacts, PlaceFacts, PortFacts
from coordexp.machine.findings import MachineFinding, error, fine, note, warning

GB = 1e9
MB = 1e6
LONGEST_TMPDIR = 70
"""Bytes. Sockets of loader workers lie in TMPDIR under names of 30 and more, and a path of theirs holds 107."""
LEAST_FREE = 2 * GB
_SLOW_DISK = 50 * MB
_LEAST_INODES = 10_000
_LEAST_SHARED, _COMFORTABLE_SHARED = 256 * MB, 2 * GB
_LEAST_MEMORY, _COMFORTABLE_MEMORY = 4 * GB, 16 * GB


def judge_ports(facts: Sequence[PortFacts]) -> list[MachineFinding]:
    """A port that is taken is an error where it was asked for, a warning where it is only the default."""
    found: list[MachineFinding] = []
    for port in facts:
        if port.error is None:
            found.append(fine("ports", f"{port.port} ({port.use}) is free."))
            continue
        kind = error if port.asked else warning
        found.append(
            kind("ports", f"{port.port} ({port.use}): {port.error}.",
                 f"End what listens there (`ss -ltnp | grep {port.port}`), or use another port.")
        )  # fmt: skip
    return found


def judge_places(facts: Sequence[PlaceFacts]) -> list[MachineFinding]:
    """Whether they can be written to, are large enough and fast enough."""
    return [finding for place in facts for finding in _place(place)]


def _place(place: PlaceFacts) -> Iterator[MachineFinding]:
    check, free = f"folder of {place.use}", f"{place.free_bytes / GB:.3g} GB free"
    if place.error is not None:
        yield error(
            check,
            f"{place.folder} cannot be written to: {place.error}.",
            "Choose another.",
        )
        return
    seen = f"{place.folder}: {free}, writes {place.bytes_per_s / MB:.3g} MB/s."
    if place.free_inodes is not None and place.free_inodes < _LEAST_INODES:
        yield error(
            check, f"{place.folder} has room for {place.free_inodes} more files.", "Delete files there."
        )
    if place.free_bytes < LEAST_FREE:
        yield error(check, seen, "Make room, or choose another folder.")
    elif place.bytes_per_s < _SLOW_DISK:
        yield warning(check, seen, "That is slow: saving a 4B model takes minutes. Choose a local disk.")
    elif place.free_bytes < place.wanted_bytes:
        yield warning(
            check, seen, f"{place.wanted_bytes / GB:.0f} GB are wanted there for a 4B model: make room, choose another "
            "folder, or save less (save_only_model, save_total_limit).",
        )  # fmt: skip
    else:
        yield fine(check, seen)


def judge_memory(facts: MemoryFacts, ranks_here: int) -> list[MachineFinding]:
    """ranks_here: processes that are to run on this machine."""
    return [*_shared(facts), _main_memory(facts), *_cores(facts, ranks_here)]


def _shared(facts: MemoryFacts) -> Iterator[MachineFinding]:
    check = "shared memory"
    do = "In a container: --shm-size=16g (or --ipc=host). Else dataloader_num_workers: 0."
    if facts.shared_bytes is None or facts.shared_free_bytes is None:
        yield error(check, "there is no /dev/shm: loader workers and vLLM need it.", do)
        return
    free = f"/dev/shm has {facts.shared_free_bytes / GB:.2g} of {facts.shared_bytes / GB:.2g} GB free"
    if facts.shared_free_bytes < _LEAST_SHARED:
        yield error(check, f"{free}: loader workers end with a bus error.", do)
    elif facts.shared_free_bytes < _COMFORTABLE_SHARED:
        yield warning(check, f"{free}: large batches do not fit.", do)
    else:
        yield fine(check, f"{free}.")


def _main_memory(facts: MemoryFacts) -> MachineFinding:
    left = facts.available_bytes
    seen = f"{left / GB:.3g} GB available."
    if facts.limit_bytes is not None:
        in_group = facts.limit_bytes - (facts.used_bytes or 0)
        if in_group < left:
            left = in_group
            seen = f"the control group has {left / GB:.3g} of its {facts.limit_bytes / GB:.3g} GB left."
    if left < _LEAST_MEMORY:
        return error("memory", seen, "Loading a model needs more: raise the limit of the job or container.")
    if left < _COMFORTABLE_MEMORY:
        return warning("memory", seen, "Enough for tiny models; a 4B model in float32 passes through 16 GB.")
    return fine("memory", seen)


def _cores(facts: MemoryFacts, ranks_here: int) -> Iterator[MachineFinding]:
    if facts.cores < ranks_here:
        yield warning(
            "cores", f"{facts.cores:g} for {ranks_here} ranks.",
            "Ask for at least one core per rank; OMP_NUM_THREADS=1 keeps them from waiting for each other.",
        )  # fmt: skip
    else:
        yield fine("cores", f"{facts.cores:g}.")


def judge_hub(facts: HubFacts) -> MachineFinding:
    """No network is no error: everything works from folders."""
    if facts.offline:
        return fine("hub", "HF_HUB_OFFLINE is set: models come from folders and from the cache alone.")
    if facts.error is None:
        return fine("hub", f"answers in {facts.seconds:.1f} s.")
    return warning(
        "hub", f"does not answer ({facts.error}, after {facts.seconds:.1f} s).",
        "Without a network: export HF_HUB_OFFLINE=1, name models and data by folders, set check_model: false, and "
        "report_to: none or tensorboard. Behind a proxy: HTTPS_PROXY; with a mirror: HF_ENDPOINT.",
    )  # fmt: skip


def judge_temporary(path: Path) -> MachineFinding:
    """path: where temporary files go (TMPDIR)."""
    length = len(os.fsencode(path))
    if length > LONGEST_TMPDIR:
        return error(
            "TMPDIR", f"{path} has {length} bytes; sockets of loader workers lie there, their paths would be too long, "
            "and training hangs before its first step.",
            f"export TMPDIR=/tmp, or another path of up to {LONGEST_TMPDIR} bytes.",
        )  # fmt: skip
    return fine("TMPDIR", f"{path}.")


def unasked(check: str, what: str) -> MachineFinding:
    """Something that the user left out."""
    return note(check, f"not tried ({what}).")
