"""Processes of a study: one log each, what they cost, and none left behind when the study ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from coordexp.files import append_jsonl, log_tail
from coordexp.study.records import ATTEMPTS

_PATIENCE = 5.0  # seconds between asking a process to end and ending it


class ProcessError(Exception):
    """A process of a cell that ended with an error; the text is the end of its log."""


class Processes:
    """Runs processes from several threads.

    threads: of each process.  keep_open: a file that they inherit.
    """

    def __init__(self, threads: int, *, keep_open: int) -> None:
        self._keep_open = keep_open
        self._environment = {
            "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", **os.environ,
            "OMP_NUM_THREADS": str(threads),
        }  # fmt: skip
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self.is_stopped = False

    def run(self, command: Sequence[str], folder: Path, phase: str, note: Mapping[str, object]) -> None:
        """Run a command to its end, with `<phase>.log` in the folder; ProcessError where it fails.

        note: goes into its lines of `attempts.jsonl`.
        """
        log = folder / f"{phase}.log"
        begun = time.monotonic()
        append_jsonl(folder / ATTEMPTS, {"phase": phase, "event": "begin", **note})
        with log.open("ab") as stream:
            stream.write(f"$ {' '.join(command)}\n".encode())
            stream.flush()
            # A session of its own, so that what it starts can be ended with it.
            process = self._start(command, stream.fileno())
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        with self._lock:
            self._running.discard(process)
        end = {
            "phase": phase, "event": "end", "exit_code": process.returncode, "wall_s": time.monotonic() - begun,
            "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mib": usage.ru_maxrss / 1024,
        }  # fmt: skip
        append_jsonl(folder / ATTEMPTS, end)
        if process.returncode != 0:
            raise ProcessError(
                f"{phase} ended with exit code {process.returncode}; {log} ends:\n{log_tail(log)}"
            )

    def stop(self) -> None:
        """End all of them; what is started afterwards fails."""
        with self._lock:
            self.is_stopped = True
            running = list(self._running)
        for signal_number, patience in ((signal.SIGTERM, _PATIENCE), (signal.SIGKILL, 0.0)):
            for process in running:
                _signal(process, signal_number)
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline and any(process.returncode is None for process in running):
                time.sleep(0.1)

    def _start(self, command: Sequence[str], log: int) -> subprocess.Popen[bytes]:
        with self._lock:
            if self.is_stopped:
                raise ProcessError("the study was stopped")
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment,
                start_new_session=True, pass_fds=(self._keep_open,),
            )  # fmt: skip
            self._running.add(process)
            return process


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
