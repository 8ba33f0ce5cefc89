"""Where what is known of data files is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "COORDEXP_CACHE"


def cache_folder() -> Path:
    """Where checked records are kept."""
    named = os.environ.get(CACHE_VARIABLE)
    return (
        Path(named)
        if named
        else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "coordexp"
    )
