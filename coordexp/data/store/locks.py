"""Work that one process does while the others, which need its result, wait."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from coordexp.errors import ConfigError

logger = logging.getLogger(__name__)

_QUIET_S = 2.0


@contextmanager
def one_at_a_time(lock_file: Path, what: str) -> Iterator[None]:
    """Only one process of the machines that share the file's disk is in the block at a time.

    what: is being made there, for the line that a waiting process logs. A process that dies lets go of the lock.
    Where a file system has no locks, all go on at once: they must write so that the last result can stay.
    Raises ConfigError when the folder cannot be written to.
    """
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_file)
        try:
            lock.acquire(timeout=_QUIET_S)
        except Timeout:
            logger.info("%s: another process is at it; waiting for it", what)
            lock.acquire()
    except NotImplementedError:
        yield
        return
    except OSError as error:
        raise ConfigError(
            f"{lock_file.parent}: cannot be written ({error.strerror}), and checked records are kept there. Let the "
            "environment variable COORDEXP_CACHE name a folder of yours."
        ) from error
    try:
        yield
    finally:
        lock.release()
