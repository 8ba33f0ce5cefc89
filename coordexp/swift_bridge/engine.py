"""Generation with a loaded checkpoint through ms-swift's TransformersEngine and our template."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from swift.infer_engine import InferRequest, RequestConfig, TransformersEngine
from swift.model import get_model_processor
from swift.template import get_template
from swift.utils import get_logger

from coordexp.errors import ConfigError
from coordexp.swift_bridge.loading import models_as_saved
from coordexp.swift_bridge.remote_code import TRUST_FLAG, check_remote_code
from coordexp.swift_bridge.template import register_coord_template


@dataclass(frozen=True)
class Generation:
    """One generated answer: token ids (image pads expanded in the prompt), log-probabilities per response token."""

    prompt_token_ids: list[int]
    response_token_ids: list[int]
    token_logprobs: list[float]
    finish_reason: str


def quiet() -> None:
    """From here on ms-swift's logger reports errors only."""
    get_logger().setLevel(logging.ERROR)


def load_engine(
    checkpoint: str | Path,
    *,
    prepare_model: Callable[[Any], Any] | None,
    model_type: str = "qwen3_vl",
    torch_dtype: torch.dtype = torch.float32,
    attn_impl: str = "sdpa",
    max_batch_size: int = 16,
    max_length: int | None = None,
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> TransformersEngine:
    """A TransformersEngine for a checkpoint folder; ConfigError when the folder is no checkpoint.

    trust_remote_code: run Python code that comes with the checkpoint; without it such a checkpoint is a ConfigError.
    prepare_model: gives the loaded model what it lacks (an adapter, LoRA weights) and returns it; None for a plain one.
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
            str(path),
            model_type=model_type,
            torch_dtype=torch_dtype,
            attn_impl=attn_impl,
            device_map=device_map,
        )
    if prepare_model is not None:
        model = prepare_model(model)
    template = get_template(processor, max_length=max_length)
    return TransformersEngine(model.eval(), template=template, max_batch_size=max_batch_size)


def generate(
    engine: TransformersEngine,
    conversations: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
) -> list[Generation]:
    """One answer per conversation (`{"messages": [...], "images": [...]}`), greedy when temperature is 0."""
    requests = [InferRequest(messages=c["messages"], images=list(c["images"])) for c in conversations]
    config = RequestConfig(
        max_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        logprobs=True,
        top_logprobs=1,
        return_details=True,
    )
    return [_generation(response) for response in engine.infer(requests, config, use_tqdm=False)]


def _generation(response: Any) -> Generation:
    choice = response.choices[0]
    return Generation(
        prompt_token_ids=list(response.prompt_token_ids),
        response_token_ids=list(choice.token_ids),
        token_logprobs=[entry["logprob"] for entry in choice.logprobs["content"]],
        finish_reason=choice.finish_reason,
    )
