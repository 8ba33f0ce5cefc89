"""`coordexp ... | head`: a reader that leaves ends the command quietly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_no_traceback_when_nobody_reads_the_output():
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "coordexp.cli.main", "metrics", "list"]
    done = subprocess.run(
        command, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT, timeout=60
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, "")
