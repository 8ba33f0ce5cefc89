"""ms-swift's vLLM engine inside the training process, and questions encoded for it.

vLLM itself is imported when an engine is built; `set_environment` comes before that.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from copy import copy
from types import MappingProxyType
from typing import Any

import torch

MAX_IMAGES = 1  # of a question; the engine reserves memory for so many

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core runs in this process, so that weights are handed over
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, CPU builds only
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # CPU builds only: leave the threads of training where they are
}


def set_environment() -> None:
    """What vLLM must find in the environment when it is imported; what the user has set stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def build_vllm_engine(
    model_dir: str,
    template: Any,
    *,
    dtype: torch.dtype,
    engine_settings: Mapping[str, Any],
    world_size: int,
    seed: int,
    own_head: bool | None,
    logits_processors: Sequence[str] = (),
    engine_args: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """A GRPOVllmEngine that was started from a checkpoint folder.

    It runs Python code that comes with the checkpoint only where the template was loaded so.

    engine_settings: arguments of the engine by ms-swift's names (`tensor_parallel_size`, `max_model_len`, ...).
    world_size: training processes; with more than one, vLLM joins their process group.
    engine_args: further arguments by vLLM's names; they win over what ms-swift sets.
    own_head: whether the engine must hold embedding and head apart; None leaves it to the model's config.
    """
    set_environment()
    from swift.infer_engine import GRPOVllmEngine

    class PolicyEngine(GRPOVllmEngine):
        engine_args: Any

        def _prepare_engine(self) -> None:
            self.engine_args = dataclasses.replace(self.engine_args, **engine_args)
            self.engine_args.dtype = str(dtype).removeprefix("torch.")
            self.engine_args.trust_remote_code = self.model_meta.loader.default_trust_remote_code
            super()._prepare_engine()

    options: dict[str, Any] = {"logits_processors": list(logits_processors)} if logits_processors else {}
    if own_head:
        untied = {"tie_word_embeddings": False}
        options["hf_overrides"] = {**untied, "text_config": untied}
    return PolicyEngine(
        model_dir,
        template=copy(template),
        use_async_engine=False,
        seed=seed,
        limit_mm_per_prompt={"image": MAX_IMAGES, "video": 0},
        mm_processor_cache_gb=0,
        distributed_executor_backend="external_launcher" if world_size > 1 else None,
        engine_kwargs=options,
        **engine_settings,
    )


def encode_for_vllm(
    engine: Any, messages: Sequence[dict[str, str]], images: Sequence[str | bytes]
) -> dict[str, Any]:
    """A conversation with images (paths or files) as `submit` takes it; the engine expands placeholders."""
    from swift.infer_engine import InferRequest

    request = InferRequest(messages=[dict(message) for message in messages], images=list(images))
    encoded: dict[str, Any] = engine.template.encode(request)
    return encoded


def submit(engine: Any, request_id: str, encoded: dict[str, Any], sampling: Any) -> None:
    """Queue an encoded conversation in the engine."""
    engine._add_request(encoded, sampling, request_id)


def prompt_with_picture(encoded: dict[str, Any]) -> dict[str, Any]:
    """An encoded conversation with a picture, as vLLM's own prompt."""
    return {
        "prompt_token_ids": encoded["input_ids"],
        "multi_modal_data": {"image": encoded["images"][0]},
        "mm_processor_kwargs": encoded.get("mm_processor_kwargs") or {},
    }


def engine_patches(engine: Any, encoded: dict[str, Any], sampling: Any) -> torch.Tensor | None:
    """Patches [P, D] that the engine's own processor makes of an encoded conversation's picture; None without one."""
    if not encoded.get("images"):
        return None
    core = engine.engine
    made = core.input_processor.process_inputs(
        "patches", prompt_with_picture(encoded), sampling, supported_tasks=core.get_supported_tasks()
    )
    patches_PD: torch.Tensor = made.mm_features[0].data.get_data()["pixel_values"]
    return patches_PD


def stop_engine(engine: Any) -> None:
    """Let go of its memory; nothing can be asked afterwards."""
    engine.engine.engine_core.shutdown()
