"""A checkpoint folder as it was saved: its template without its weights, or its model with both."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from swift.model import get_model_processor
from swift.template import get_template
from swift.utils import get_logger

from coordexp.config.schema.prompt import Prompt
from coordexp.errors import ConfigError
from coordexp.swift_bridge.loading import models_as_saved
from coordexp.swift_bridge.remote_code import TRUST_FLAG, check_remote_code
from coordexp.swift_bridge.template import register_coord_template


def quiet() -> None:
    """From here on ms-swift's logger reports errors only."""
    get_logger().setLevel(logging.ERROR)


def load_template(
    checkpoint: str | Path,
    *,
    prompt: Prompt | None = None,
    model_type: str = "qwen3_vl",
    trust_remote_code: bool = False,
) -> Any:
    """Our template around the tokenizer and processor of `checkpoint`.

    prompt: whose template and pixel limits are used; None: those of the folder.
    trust_remote_code: run Python code that comes with the checkpoint; without it such a checkpoint is a ConfigError.
    """
    check_remote_code(checkpoint, trusted=trust_remote_code, setting=TRUST_FLAG)
    register_coord_template()
    with models_as_saved(trust_remote_code=trust_remote_code):
        _, processor = get_model_processor(str(checkpoint), model_type=model_type, load_model=False)
    return _template_for(processor, prompt)


def _template_for(processor: Any, prompt: Prompt | None) -> Any:
    template = get_template(processor, template_type=None if prompt is None else prompt.template)
    if prompt is not None:
        template.limit_pixels(min_pixels=prompt.min_pixels, max_pixels=prompt.max_pixels)
    return template


def load_model(
    checkpoint: str | Path,
    *,
    prompt: Prompt | None = None,
    prepare_model: Callable[[Any], Any] | None = None,
    model_type: str = "qwen3_vl",
    torch_dtype: torch.dtype = torch.float32,
    attn_impl: str = "sdpa",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """(model in evaluation mode, our template around its tokenizer and processor).

    prompt: as in `load_template`.
    prepare_model: gives the loaded model what it lacks (an adapter, LoRA weights) and returns it; None for a plain one.
    trust_remote_code: run Python code that comes with the checkpoint; without it such a checkpoint is a ConfigError.

    Raises:
        ConfigError: the folder holds no model.
    """
    path = Path(checkpoint)
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"{path} is not a model folder (no config.json). Give a checkpoint folder, for example "
            "runs/NAME/checkpoint-100, or make a tiny model with `coordexp model tiny --output DIR`."
        )
    check_remote_code(path, trusted=trust_remote_code, setting=TRUST_FLAG)
    register_coord_template()
    with models_as_saved(trust_remote_code=trust_remote_code):
        model, processor = get_model_processor(
            str(path), model_type=model_type, torch_dtype=torch_dtype, attn_impl=attn_impl
        )
    if prepare_model is not None:
        model = prepare_model(model)
    return model.eval(), _template_for(processor, prompt)
