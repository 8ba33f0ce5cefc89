"""The exit code of a run through a launcher of several processes, which answers 1 whatever its processes end with."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from coordexp.files import write_text

EXIT_FILE = "COORDEXP_EXIT_FILE"
"""Environment variable with the file that a process of the run writes its exit code to."""


@contextmanager
def asked_for() -> Iterator[tuple[Mapping[str, str], Callable[[], int | None]]]:
    """Variables for the run's environment, and a function that gives the exit code it left, None where it left none."""
    with tempfile.TemporaryDirectory(prefix="coordexp_exit_") as folder:
        path = Path(folder) / "code"

        def told() -> int | None:
            return int(path.read_text()) if path.exists() else None

        yield {EXIT_FILE: str(path)}, told


def leave_exit_code(code: int) -> None:
    """Tell `asked_for` of the process that started the run, if there is one."""
    path = os.environ.get(EXIT_FILE)
    if path and Path(path).parent.is_dir():
        write_text(path, str(code), sync=False)
