"""A training process of its own, for comparisons: its log beside what it writes, and what it cost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Cost(NamedTuple):
    """Of a process with its children: CPU seconds, its start among them, and the largest resident size."""

    cpu_s: float
    peak_mib: float


def run_training(
    config: Path, folder: Path, flags: Sequence[str], environment: Mapping[str, str] | None = None
) -> Cost:
    """Run `coordexp train` into `folder`; SystemExit naming the log where it fails.

    environment: defaults of variables that are not set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "coordexp.cli.main", "train", str(config), "--output_dir", str(folder), *flags,
    ]  # fmt: skip
    with (folder / "train.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**(environment or {}), **os.environ}
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed; see {folder / 'train.log'}")
    return Cost(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)
