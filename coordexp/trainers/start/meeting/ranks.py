"""The ranks of a launcher until they train: they meet once, and the end of one is the end of all.

    ranks = of_launcher()                 # None for a process alone
    ranks.meet(facts, output)             # raises the same error on every rank, or returns
    ranks.watch()                         # from here on another rank's failure ends this process
    ranks.failed(error)                   # tell the others
    ranks.over()                          # training begins: torch's own watchdogs take over

Before a process group is up, and while ranks load data and models, a rank that fails would leave the others waiting in
a collective: ms-swift's limit for those is 208 days, and launchers on several nodes do not end each other's processes.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

from coordexp.config.exit_code import leave_exit_code
from coordexp.errors import EXIT_FAILURE, ConfigError, CoordExpError
from coordexp.trainers.start.meeting.compare import disagreements
from coordexp.trainers.start.meeting.facts import OutputFolder, StartFacts
from coordexp.trainers.start.meeting.store import (
    MEET_VARIABLE,
    Launch,
    MeetingError,
    launch_of,
    open_store,
    wait_until,
)

_SEE_S = 5.0
"""So long a network disk may take to show a new file on another node."""
_LOOK_EVERY_S = 1.0
_LINGER_S = 5.0
"""A rank that fails stays so long for the others to hear of it, since with rank 0 the store may go."""
_SILENT_S = 60.0
_FAILED, _VERDICT, _TOKEN = "failed", "verdict", "token"
_ARRIVED, _HEARD, _TRAINS = "arrived", "heard", "trains"
"""Keys of the store; the last three count ranks."""

MakeFacts = Callable[[bool], StartFacts]
"""From whether this rank sees the output folder of rank 0 to what it tells the others."""


class Ranks:
    """This rank and the others. launch: what the launcher says."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self._store: Any = None
        self._over = Event()
        self._has_failed = self._trains = False

    def meet(self, facts: MakeFacts, output: OutputFolder, plugins: Sequence[str] = ()) -> None:
        """Compare what all ranks have. Every rank calls it; it takes as long as the slowest needs to come.

        plugins: paths without which a rank cannot come.

        Raises:
            ConfigError: they differ; the same sentence on every rank.
            MeetingError: some do not come in time, or fail before.
        """
        try:
            self._meet(facts, output, plugins)
        except RuntimeError as error:  # of the store
            raise self._gone() from error

    def _meet(self, facts: MakeFacts, output: OutputFolder, plugins: Sequence[str]) -> None:
        store = self._opened()
        token = _Token(output.path) if self.launch.rank == 0 else None
        try:
            if token is not None:
                store.set(_TOKEN, token.name)
            sees = self._sees(output.path)
            store.set(f"facts/{self.launch.rank}", facts(sees).to_json())
            store.add(_ARRIVED, 1)
            if token is not None:
                self._judge(output, plugins)
            self._wait(_VERDICT, "rank 0 does not come")
        finally:
            if token is not None:
                token.remove()
        verdict = store.get(_VERDICT).decode()
        if verdict:
            self._has_failed = True
            raise ConfigError(verdict)

    def watch(self) -> None:
        """End this process as soon as another rank fails or goes silent, until `over`."""
        self._store.set(f"alive/{self.launch.rank}", "0")
        Thread(target=self._look, name="coordexp-ranks", daemon=True).start()

    def failed(self, error: BaseException) -> None:
        """Tell the others that this rank ends with `error`, and wait a moment until they have heard."""
        if self._trains or self._over.is_set():
            return
        self._over.set()
        with suppress(RuntimeError, CoordExpError):  # the others are gone already, or never came
            store = self._opened()
            if not self._has_failed:
                code = error.exit_code if isinstance(error, CoordExpError) else EXIT_FAILURE
                text = str(error) if isinstance(error, CoordExpError) else f"{type(error).__name__}: {error}"
                told = {"rank": self.launch.rank, "name": self.launch.name, "text": text, "code": code}
                store.compare_set(_FAILED, "", json.dumps(told))
            self._leave(store)

    def over(self) -> None:
        """Training begins. The others are watched until it does for all of them."""
        self._trains = True
        if self._store is not None:
            with suppress(RuntimeError):  # of the store; the thread says so
                self._store.add(_TRAINS, 1)

    def _opened(self) -> Any:
        if self._store is None:
            self._store = open_store(self.launch)
        return self._store

    def _leave(self, store: Any) -> None:
        """Stay until all ranks have heard; shorter where this one keeps nothing that they need."""
        store.add(_HEARD, 1)
        keeps = self.launch.rank == 0 and not self.launch.has_store
        wait_until(lambda: store.add(_HEARD, 0) >= self.launch.size, _LINGER_S * (3 if keeps else 1))

    def _sees(self, folder: str | None) -> bool:
        """Whether what rank 0 put into its output folder is in this one's."""
        self._wait(_TOKEN, "rank 0 does not come")
        name = self._store.get(_TOKEN).decode()
        if not name or folder is None:
            return True
        return wait_until((Path(folder) / name).exists, _SEE_S)

    def _wait(self, key: str, complaint: str) -> None:
        if not wait_until(
            lambda: self._heard_failure() or self._store.check([key]), self.launch.meet_s + _SEE_S
        ):
            raise MeetingError(f"{self.launch.name}: {complaint} within {self.launch.meet_s:g} s.")
        self._raise_failure()

    def _judge(self, output: OutputFolder, plugins: Sequence[str]) -> None:
        store, size = self._store, self.launch.size
        arrived = wait_until(
            lambda: self._heard_failure() or store.add(_ARRIVED, 0) >= size, self.launch.meet_s
        )
        self._raise_failure()
        if arrived:
            ranks = [StartFacts.from_json(store.get(f"facts/{rank}")) for rank in range(size)]
            store.set(_VERDICT, "\n  ".join(disagreements(ranks, output)))
            return
        lost = [rank for rank in range(size) if not store.check([f"facts/{rank}"])]
        raise MeetingError(
            f"rank {', '.join(map(str, lost[:8]))}{' and more' if len(lost) > 8 else ''} of {size} did not come within "
            f"{self.launch.meet_s:g} s to {self.launch.name}. Look at what is said there; "
            f"{' and '.join(plugins) or 'the plugin'} (external_plugins) and the run file must be on every node. "
            f"{MEET_VARIABLE} gives slow ones more seconds."
        )

    def _heard_failure(self) -> bool:
        return bool(self._store.check([_FAILED]))

    def _raise_failure(self) -> None:
        if not self._heard_failure():
            return
        told = json.loads(self._store.get(_FAILED))
        self._has_failed = True
        error = MeetingError(f"{told['name']} failed: {told['text']}")
        error.exit_code = told["code"]
        raise error

    def _look(self) -> None:
        """In a thread: hear of failures, say that this rank lives; rank 0 looks who is silent."""
        beats: dict[int, tuple[bytes, float]] = {}
        number = 0
        while not self._over.wait(_LOOK_EVERY_S):
            try:
                if self._store.add(_TRAINS, 0) >= self.launch.size:
                    return
                number += 1
                self._store.set(f"alive/{self.launch.rank}", str(number))
                if self.launch.rank == 0:
                    self._look_for_silent(beats)
                self._raise_failure()
            except CoordExpError as error:
                if not self._over.is_set():
                    self._end(error)
            except RuntimeError:  # of the store
                if not self._over.is_set():
                    self._end(self._gone())

    def _look_for_silent(self, beats: dict[int, tuple[bytes, float]]) -> None:
        now = time.monotonic()
        for rank in range(1, self.launch.size):
            key = f"alive/{rank}"
            said = self._store.get(key) if self._store.check([key]) else b""
            if said != beats.get(rank, (None, 0.0))[0]:
                beats[rank] = (said, now)
            elif now - beats[rank][1] > _SILENT_S:
                text = f"rank {rank} says nothing for {_SILENT_S:g} s while the run starts; it was ended or is lost"
                told = {"rank": rank, "name": f"rank {rank}", "text": text, "code": EXIT_FAILURE}
                self._store.compare_set(_FAILED, "", json.dumps(told))

    def _gone(self) -> MeetingError:
        where = f"{self.launch.address}:{self.launch.port}"
        return MeetingError(f"{self.launch.name}: rank 0 or its launcher at {where} is gone.")

    def _end(self, error: CoordExpError) -> None:
        """The main thread may wait for a rank that is gone, where no exception reaches it."""
        print(f"coordexp: {error}", file=sys.__stderr__, flush=True)
        leave_exit_code(error.exit_code)
        with suppress(RuntimeError):
            self._leave(self._store)
        sys.stdout.flush()
        os._exit(error.exit_code)


class _Token:
    """A file of rank 0 in the output folder for the others to see; folders that it makes go with it."""

    def __init__(self, folder: str | None) -> None:
        self.name = "" if folder is None else f".coordexp-{uuid.uuid4().hex}"
        self._made: list[Path] = []
        self._file: Path | None = None
        if folder is None:
            return
        missing = [path for path in (Path(folder), *Path(folder).parents) if not path.exists()]
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._made, self._file = missing, Path(folder) / self.name
            self._file.touch()
        except OSError as error:
            raise ConfigError(
                f"output_dir: {folder} cannot be written ({error.strerror}). Choose another place."
            ) from error

    def remove(self) -> None:
        """Leave the disk as it was."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)
        for folder in self._made:
            with suppress(OSError):  # someone else has begun to use it
                folder.rmdir()


_current: Ranks | None = None


def of_launcher() -> Ranks | None:
    """Those of this process; None where it is alone."""
    global _current
    if _current is None:
        launch = launch_of(os.environ)
        _current = None if launch is None else Ranks(launch)
    return _current


def tell_failure(error: BaseException) -> None:
    """Tell the other ranks, if there are any, that this one ends."""
    if _current is not None:
        _current.failed(error)


def training_begins() -> None:
    """The start is over: nobody watches the others any more."""
    if _current is not None:
        _current.over()
