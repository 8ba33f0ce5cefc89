"""Runs of `swift sft` whose memory runs out on demand: integration/tight_memory_plugin.py and its settings."""

from __future__ import annotations

import json
from pathlib import Path

TIGHT = Path(__file__).resolve().parents[1] / "integration" / "tight_memory_plugin.py"


def tight(columns: int, rows: int, times: int) -> dict[str, str]:
    """Environment of a run in which a matrix of so many columns, and rows or more, fails so often."""
    return {"TIGHT_COLUMNS": str(columns), "TIGHT_ROWS": str(rows), "TIGHT_TIMES": str(times)}


def vocabulary(model: Path) -> int:
    """Rows of the head of a model folder."""
    size: int = json.loads((model / "config.json").read_text())["text_config"]["vocab_size"]
    return size
