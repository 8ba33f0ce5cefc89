"""What was seen of a machine, as plain values: gathered in `gather/`, judged in `judge.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PackageFacts:
    """versions: of the packages of the table; None where one is missing.  torch_cuda: what torch was built for; None:
    CPUs, or no torch.  broken: demands of installed packages that no installed one meets, as sentences.
    """

    python: str
    versions: Mapping[str, str | None]
    torch_cuda: str | None
    broken: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gpu:
    """capability: (major, minor).  error: of a small product in bfloat16; None: it came out right."""

    name: str
    memory_bytes: int
    free_bytes: int
    capability: tuple[int, int]
    error: str | None = None


@dataclass(frozen=True)
class DeviceFacts:
    """driver: its version; None where there is none.  listed: devices that it lists.  gpus: those that torch sees.
    error: why torch sees none.  visible: CUDA_VISIBLE_DEVICES; None where it is not set.
    """

    driver: str | None
    listed: int
    gpus: tuple[Gpu, ...]
    error: str | None = None
    visible: str | None = None


@dataclass(frozen=True)
class RankFacts:
    """What the ranks of a launcher did together.

    backend: `nccl` or `gloo`.  error: None where they met and summed right.  meet_s: until all had met.
    bytes_per_s: of an all-reduce, counted once per rank.  hosts: of all ranks.
    versions: package -> the different versions among the ranks, where there are several.
    """

    world_size: int
    backend: str
    error: str | None
    meet_s: float = 0.0
    bytes_per_s: float = 0.0
    hosts: tuple[str, ...] = ()
    versions: Mapping[str, tuple[str, ...]] | None = None


@dataclass(frozen=True)
class PortFacts:
    """use: what would listen there.  error: None where the port is free.  asked: the user named it."""

    port: int
    use: str
    error: str | None
    asked: bool


@dataclass(frozen=True)
class PlaceFacts:
    """A folder that a run writes to.

    folder: itself, or the nearest one above it that exists.  wanted_bytes: what usual work needs there.
    free_inodes: None where the file system has no limit.  bytes_per_s: of writing, waited for until it is on the disk.
    error: None where it can be written to.
    """

    use: str
    path: Path
    folder: Path
    wanted_bytes: int
    free_bytes: int
    free_inodes: int | None
    bytes_per_s: float
    error: str | None


@dataclass(frozen=True)
class MemoryFacts:
    """Bytes. shared_*: /dev/shm, None where there is none.  limit_bytes, used_bytes: of the control group; None: no
    limit.  available_bytes: of the whole machine.  cores: that this process may use, quota of the group included.
    """

    shared_bytes: int | None
    shared_free_bytes: int | None
    limit_bytes: int | None
    used_bytes: int | None
    available_bytes: int
    cores: float


@dataclass(frozen=True)
class HubFacts:
    """offline: HF_HUB_OFFLINE is set.  error: None where the hub answered (nothing is asked when offline)."""

    endpoint: str
    offline: bool
    error: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class AnswerFacts:
    """A few tokens of a tiny random model by one backend, in a process of its own.

    state: `answered`, `failed`, `too late` or `not installed`.  tokens: ids of the answer.  log: its last lines.
    """

    backend: str
    state: str
    tokens: tuple[int, ...] = ()
    seconds: float = 0.0
    device: str = ""
    log: str = ""


@dataclass(frozen=True)
class MachineFacts:
    """Everything. ranks: None without a launcher.  answers: empty where none were asked for."""

    host: str
    packages: PackageFacts
    devices: DeviceFacts
    ranks: RankFacts | None
    ports: tuple[PortFacts, ...]
    places: tuple[PlaceFacts, ...]
    memory: MemoryFacts
    hub: HubFacts
    temporary: Path
    answers: tuple[AnswerFacts, ...]
