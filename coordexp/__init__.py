"""CoordExp: train vision-language models to write detections with coordinate tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coordexp.api import (
        BoxObject,
        Detections,
        Detector,
        MatchResult,
        ParsedRollout,
        Record,
        evaluate,
        load_records,
        match,
        parse,
    )

__version__ = "0.1.0"
__all__ = [
    "BoxObject",
    "Detections",
    "Detector",
    "MatchResult",
    "ParsedRollout",
    "Record",
    "__version__",
    "evaluate",
    "load_records",
    "match",
    "parse",
]


def __getattr__(name: str) -> Any:
    """The names of `coordexp.api`, which is imported when one is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'coordexp' has no attribute {name!r}")
    from coordexp import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"TYPE_CHECKING", "Any", "annotations"})
