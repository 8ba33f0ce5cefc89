"""The template of a checkpoint folder, without loading its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swift.model import get_model_processor
from swift.template import get_template

from coordexp.swift_bridge.template import register_coord_template


def load_template(checkpoint: str | Path, *, model_type: str = "qwen3_vl") -> Any:
    """Our template around the tokenizer and processor of `checkpoint`."""
    register_coord_template()
    _, processor = get_model_processor(str(checkpoint), model_type=model_type, load_model=False)
    return get_template(processor)
