"""A second plugin of `swift sft`: memory runs out where a matrix of TIGHT_COLUMNS columns has TIGHT_ROWS rows or more.

TIGHT_TIMES: how often at most.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.tight_memory import TightMemory

COLUMNS, ROWS, TIMES = (int(os.environ[f"TIGHT_{name}"]) for name in ("COLUMNS", "ROWS", "TIMES"))

if not multiprocessing.current_process().daemon:
    TightMemory(
        lambda shape, _: len(shape) == 2 and shape[1] == COLUMNS and shape[0] >= ROWS, times=TIMES
    ).__enter__()
