"""`coordexp train` in a process of its own, ended together with whoever started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

POLL_S = 1.0
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NPROC_PER_NODE", "NNODES", "NODE_RANK")
_LAUNCHERS = (*_RANKS, "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


def train(
    run_file: Path,
    words: Sequence[str],
    log: Path,
    *,
    one_process: bool = False,
    lock: int | None = None,
    watch: Callable[[], object] | None = None,
    environment: Mapping[str, str] | None = None,
) -> int:
    """The exit code of `coordexp train RUN_FILE WORDS`; what it prints is appended to `log`.

    one_process: whatever ranks the environment asks for.  watch: called every second while it runs.
    environment: variables for where this process has none.
    """
    command = [sys.executable, "-m", "coordexp.cli.main", "train", str(run_file), *words]
    known = {**(environment or {}), **os.environ}
    if one_process:
        known = {name: value for name, value in known.items() if name not in _LAUNCHERS}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=known,
            pass_fds=() if lock is None else (lock,),
        )
        with _ended_with_us(process):
            while watch is not None and process.poll() is None:
                watch()
                time.sleep(POLL_S)
            return process.wait()


@contextmanager
def _ended_with_us(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """When the block is left early (an interrupt, SIGTERM), the process and all below it are ended too."""

    def leave(_number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if process.poll() is None:
            _end(process.pid)


def _end(pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        family = [*parent.children(recursive=True), parent]
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.terminate()
        _, left = psutil.wait_procs(family, timeout=30)
        for one in left:
            with suppress(psutil.NoSuchProcess):
                one.kill()
