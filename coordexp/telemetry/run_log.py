"""`run.log` of a run folder: everything that the process, its libraries and its children write to the console.

The descriptors 1 and 2 lead to a program of its own (copy_streams.py), which hands on every byte and keeps a copy:
output of C libraries and of workers is in it, and of a killed process everything up to its end. A resumed run appends;
each attempt begins with a header.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

RUN_LOG = "run.log"
HEADER = "======== attempt "
_COPIER = Path(__file__).with_name("copy_streams.py")
_MARK = "COORDEXP_RUN_LOG"
"""Environment variable of a process that is recorded: its children write to the same descriptors."""
_SECONDS_TO_FINISH = 5.0


@dataclass
class _Recording:
    process: subprocess.Popen[bytes]
    control: int | None
    """Where the path of the file is told; None once it is."""
    consoles: dict[int, int]
    """Descriptor -> copy of what it led to before."""


_recording: _Recording | None = None


def start(rank: int) -> None:
    """Record this process from now on; nothing is written before `open_in`.

    rank: of the process. Of rank 0 both streams are recorded, of the others what they write to stderr, line by line
    behind `[rank N]`.
    """
    global _recording
    if _MARK in os.environ:
        return
    os.environ[_MARK] = str(os.getpid())
    _flush()
    control_end, control = os.pipe()
    consoles, pipes, words = {}, [], []
    for descriptor in (1, 2) if rank == 0 else (2,):
        console, (source, sink) = os.dup(descriptor), os.pipe()
        consoles[descriptor] = console
        pipes.append((descriptor, source, sink))
        words += [str(source), str(console)]
    prefix = "" if rank == 0 else f"[rank {rank}] "
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_COPIER), str(control_end), prefix, *words],
        stdin=subprocess.DEVNULL,
        pass_fds=[control_end, *consoles.values(), *(source for _, source, _ in pipes)],
        start_new_session=True,  # an interrupt of the terminal ends the run, not its record
    )
    for descriptor, source, sink in pipes:
        os.dup2(sink, descriptor)
        os.close(sink)
        os.close(source)
    os.close(control_end)
    _recording = _Recording(process, control, consoles)
    atexit.register(stop)


def open_in(folder: str | Path, *, command: str, resumed_from: str | None, has_header: bool) -> None:
    """Write what was recorded so far, and everything from now on, into `run.log` of a run folder.

    has_header: whether this process writes the header of the attempt (one does).
    """
    if _recording is None or _recording.control is None:
        return
    path = (Path(folder) / RUN_LOG).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    header = _header(path, command, resumed_from) if has_header else ""
    os.write(_recording.control, os.fsencode(path) + b"\n" + header.encode() + b"\0")
    os.close(_recording.control)
    _recording.control = None


def reaches_terminal() -> bool:
    """Whether what this process writes to stdout is seen on a terminal."""
    if _recording is None:
        return sys.stdout.isatty()
    return 1 in _recording.consoles and os.isatty(_recording.consoles[1])


def stop() -> None:
    """Let the console be the console again, and wait for what is still to be written."""
    global _recording
    recording, _recording = _recording, None
    if recording is None:
        return
    _flush()
    for descriptor, console in recording.consoles.items():
        os.dup2(console, descriptor)
        os.close(console)
    if recording.control is not None:
        os.close(recording.control)
    os.environ.pop(_MARK, None)
    try:
        recording.process.wait(_SECONDS_TO_FINISH)
    except subprocess.TimeoutExpired:  # a child lives on and may write more
        return


def _header(path: Path, command: str, resumed_from: str | None) -> str:
    number = 1
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            number += sum(line.startswith(HEADER) for line in file)
    begun = time.strftime("%Y-%m-%d %H:%M:%S %z")
    lines = [f"{HEADER}{number} · {begun} · process {os.getpid()}", f"command: {command}"]
    if resumed_from:
        lines.append(f"resumed from: {resumed_from}")
    return "\n".join(lines) + "\n"


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
