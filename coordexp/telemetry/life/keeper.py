"""Signs of life of this process, from a thread of its own: they go on while the main thread waits for other ranks.

    life = RankLife(run_dir, rank=0, world_size=2)
    life.start()
    life.at(step); life.does("evaluating")            # no file is written here
    life.ends(TRAINED)

SIGTERM and SIGHUP, an exception that nobody catches, and an exit before training is over leave how they ended and
`postmortem.json`. A signal is met by the thread, so that a process that hangs in a collective can still say where.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from coordexp.errors import CoordExpError
from coordexp.files import write_json
from coordexp.telemetry.life.beats import FAILED, RankBeat, RankEnd, beat_file, read_beats
from coordexp.telemetry.life.postmortem import set_aside_postmortem, write_postmortem

EVERY_S = 10.0
"""Seconds between two signs of life."""
SIGNALS = (signal.SIGTERM, signal.SIGHUP)
MAX_STACK = 20_000
_NO_SIGNAL = b"\0"


class RankLife:
    """Of one process of a run. every_s: seconds between two writings."""

    def __init__(self, run_dir: Path, rank: int, world_size: int, *, every_s: float = EVERY_S) -> None:
        self._run_dir, self._rank, self._world_size, self._every_s = run_dir, rank, world_size, every_s
        self._step, self._doing, self._step_time = 0, "starting", time.time()
        self._busy_s: float | None = None
        self._rules: tuple[Mapping[str, Any], ...] = ()
        self._end: RankEnd | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._pipe: tuple[int, int] | None = None
        self._waker = -1
        """What `signal.set_wakeup_fd` gave back."""

    def start(self) -> None:
        """Begin; call it in the main thread."""
        self._run_dir.mkdir(parents=True, exist_ok=True)
        if self._rank == 0:
            set_aside_postmortem(self._run_dir)
            for beat in read_beats(self._run_dir):
                if beat.rank >= self._world_size:
                    beat_file(self._run_dir, beat.rank).unlink(missing_ok=True)
        self._write_if_possible()
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        for number in SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, self._on_signal)
        self._waker = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._forget)
        self._hook, sys.excepthook = sys.excepthook, self._on_exception
        atexit.register(self._on_exit)
        self._thread = threading.Thread(target=self._run, name="signs-of-life", daemon=True)
        self._thread.start()

    def at(self, step: int) -> None:
        """So many optimizer steps are done."""
        self._step, self._step_time = step, time.time()

    def does(self, what: str) -> None:
        """What the process is about to do."""
        self._doing = what

    def was_busy(self, seconds: float) -> None:
        """Seconds of a step in which this rank did not wait for others, over the last log window."""
        self._busy_s = seconds

    def judged(self, findings: Iterable[Mapping[str, Any]]) -> None:
        """What was wrong at the last record."""
        self._rules = tuple(findings)

    def ends(self, how: str, reason: str = "", stack: str = "") -> None:
        """Training is over; the first call after `start` counts."""
        with self._lock:
            if self._end is not None or self._pipe is None:
                return
            self._end = RankEnd(how, reason, stack[-MAX_STACK:])
        self._write_if_possible()
        if how == FAILED:
            self._leave_postmortem()

    def fails(self, error: BaseException) -> None:
        """An exception ends training."""
        lines = traceback.format_exception(error)
        self.ends(FAILED, f"{type(error).__name__}: {error}".strip(), "".join(lines))

    def stop(self) -> None:
        """Write nothing more, and let signals be what they were."""
        if self._pipe is None or self._thread is None:
            return
        self._restore_signals()
        signal.set_wakeup_fd(self._waker)
        sys.excepthook = self._hook
        atexit.unregister(self._on_exit)
        (source, sink), self._pipe = self._pipe, None
        os.write(sink, _NO_SIGNAL)  # which ends the thread
        self._thread.join()
        os.close(source)
        os.close(sink)

    # inside

    def _beat(self) -> RankBeat:
        return RankBeat(
            self._rank,
            self._world_size,
            socket.gethostname(),
            os.getpid(),
            self._step,
            self._doing,
            time.time(),
            self._step_time,
            self._busy_s,
            self._rules,
            self._end,
        )

    def _write(self) -> None:
        with self._lock:
            write_json(beat_file(self._run_dir, self._rank), self._beat().to_json(), indent=None, sync=False)

    def _leave_postmortem(self) -> None:
        try:
            path = write_postmortem(self._run_dir)
        except (CoordExpError, OSError) as error:
            print(f"coordexp: no postmortem: {error}", file=sys.stderr)
        else:
            if path is not None and self._rank == 0:
                print(f"coordexp: {path} says how the run ended.", file=sys.stderr)

    def _run(self) -> None:
        assert self._pipe is not None
        source = self._pipe[0]
        while True:
            ready, _, _ = select.select([source], [], [], self._every_s)
            if ready:
                numbers = os.read(source, 64)
                if _NO_SIGNAL in numbers:
                    return
                for number in numbers:
                    if number in SIGNALS and signal.getsignal(number) == self._on_signal:
                        self._die(signal.Signals(number))
            elif self._end is None:
                self._write_if_possible()

    def _write_if_possible(self) -> None:
        """A full disk or a folder that has gone is said, and must not end the run."""
        try:
            self._write()
        except (CoordExpError, OSError) as error:
            print(f"coordexp: {beat_file(self._run_dir, self._rank)}: {error}", file=sys.stderr)

    def _die(self, number: signal.Signals) -> None:
        """End the process by a signal, from the thread: the main one may never come back from where it waits."""
        try:
            main = sys._current_frames().get(threading.main_thread().ident or 0)
            self.ends(FAILED, f"signal {number.name}", "".join(traceback.format_stack(main)))
        finally:
            os._exit(128 + number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """The thread acts on it."""

    def _on_exception(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        self.fails(error)
        self._hook(kind, error, trace)

    def _on_exit(self) -> None:
        self.ends(FAILED, "the process ended before training was over", "")
        self.stop()

    def _restore_signals(self) -> None:
        for number in SIGNALS:
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, signal.SIG_DFL)

    def _forget(self) -> None:
        """In a fork (a data-loader worker): its signals are its own, not those of the run."""
        if self._pipe is None:
            return
        signal.set_wakeup_fd(-1)
        self._restore_signals()
        sys.excepthook = self._hook
        atexit.unregister(self._on_exit)
        for end in self._pipe:
            os.close(end)
        self._pipe, self._thread = None, None
