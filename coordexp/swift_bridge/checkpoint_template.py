"""The template of a checkpoint folder, without loading its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swift.model import get_model_processor
from swift.template import get_template

from coordexp.swift_bridge.loading import models_as_saved
from coordexp.swift_bridge.remote_code import TRUST_FLAG, check_remote_code
from coordexp.swift_bridge.template import register_coord_template


def load_template(
    checkpoint: str | Path, *, model_type: str = "qwen3_vl", trust_remote_code: bool = False
) -> Any:
    """Our template around the tokenizer and processor of `checkpoint`.

    trust_remote_code: run Python code that comes with the checkpoint; without it such a checkpoint is a ConfigError.
    """
    check_remote_code(checkpoint, trusted=trust_remote_code, setting=TRUST_FLAG)
    register_coord_template()
    with models_as_saved(trust_remote_code=trust_remote_code):
        _, processor = get_model_processor(str(checkpoint), model_type=model_type, load_model=False)
    return get_template(processor)
