"""A model in training, borrowed for generation and given back exactly as it was."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from coordexp.errors import ConfigError

FINGERPRINT_TENSORS, FINGERPRINT_ELEMENTS = 8, 65536


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, DeepSpeed or torch.compile; still with its LoRA layers.

    Raises:
        ConfigError: the model is sharded by FSDP, whose parts nobody puts together here.
    """
    if any(hasattr(module, "_fsdp_wrapped_module") or _is_fsdp2(module) for module in model.modules()):
        raise ConfigError("rollouts cannot use a model sharded by FSDP; train with DDP or DeepSpeed ZeRO.")
    inner: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner


def _is_fsdp2(module: nn.Module) -> bool:
    return type(module).__name__.startswith("FSDP")


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """The random streams of Python, numpy and torch (CPU and current device) continue as if nothing had drawn."""
    python, arrays, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device = torch.cuda.get_rng_state() if _cuda_in_use() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        torch.set_rng_state(cpu)
        if device is not None:
            torch.cuda.set_rng_state(device)


def _cuda_in_use() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


@contextmanager
def borrowed_for_generation(model: nn.Module, deepspeed_engine: Any = None) -> Iterator[None]:
    """Evaluation mode without gradients; training flags of every module, position cache and random streams come back.

    Under ZeRO-3 all ranks enter together and hold the whole model meanwhile.

    Arguments:
        model: unwrapped.
        deepspeed_engine: the engine around it, needed under ZeRO-3.
    """
    training = [(module, module.training) for module in model.modules()]
    positions = [(module, module.rope_deltas) for module in model.modules() if "rope_deltas" in vars(module)]
    with preserved_random_state(), torch.no_grad(), _own_forwards(model), _whole(model, deepspeed_engine):
        model.eval()
        try:
            yield
        finally:
            for module, flag in training:
                module.training = flag
            for module, deltas in positions:
                module.rope_deltas = deltas


@contextmanager
def _own_forwards(model: nn.Module) -> Iterator[None]:
    """Modules run the forward that transformers gave them.

    ms-swift 4.6 replaces the forward of Qwen3-VL by one for batches of mixed media, which takes over under DeepSpeed.
    It trains well, but with transformers 5.19 tokens decoded from a cache come out wrong.
    """
    replaced: list[tuple[Any, Any]] = [
        (module, vars(module)["forward"]) for module in model.modules() if _is_replaced(module)
    ]
    for module, _ in replaced:
        module.forward = module.origin_forward
    try:
        yield
    finally:
        for module, forward in replaced:
            module.forward = forward


def _is_replaced(module: nn.Module) -> bool:
    return {"forward", "origin_forward"} <= vars(module).keys()


def gathered(parameters: Iterable[nn.Parameter]) -> Any:
    """Context in which partitioned parameters (ZeRO-3) are whole on every rank; nothing for others."""
    parameters = list(parameters)
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


@contextmanager
def _whole(model: nn.Module, deepspeed_engine: Any) -> Iterator[None]:
    """All parameters on every rank, and the engine's hooks, which would scatter them again, off the modules."""
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        yield
        return
    if deepspeed_engine is None:
        raise ConfigError(
            "the model is partitioned by DeepSpeed ZeRO-3, and the rollout backend was given neither the accelerator "
            "nor the wrapped model: pass one to build_policy_backend."
        )
    from trl.models.utils import add_hooks, remove_hooks

    with gathered(model.parameters()), _without_step_reset(deepspeed_engine.optimizer.parameter_offload):
        remove_hooks(deepspeed_engine)
        try:
            yield
        finally:
            add_hooks(deepspeed_engine)


@contextmanager
def _without_step_reset(offload: Any) -> Iterator[None]:
    """Forwards do not count as training steps of DeepSpeed's parameter offload.

    Its hook on the whole model compares notes with all ranks at the start of a forward, as long as it has not seen a
    complete step: ranks that generate with different numbers of forwards would wait for each other forever. It is no
    hook that `remove_hooks` knows of (DeepSpeed 0.19).
    """
    handle, module = offload.fwd_pre_hook, offload.module
    reset_step = module._forward_pre_hooks[handle.id]
    handle.remove()
    try:
        yield
    finally:
        offload.fwd_pre_hook = module.register_forward_pre_hook(reset_step, prepend=True)


def bit_sum(tensor: Tensor) -> Tensor:
    """Sum of the bit patterns of all elements, modulo 2^64: int64, 0-dim, no host sync.

    Exact, and independent of order and shape, so that the sum of a fused tensor is the sum of its parts.
    """
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(bits).sum(dtype=torch.int64)


def fingerprint(model: nn.Module) -> tuple[int, ...]:
    """Bit sums of samples of a few trained tensors on this rank; changes when an optimizer has stepped."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    chosen = _evenly(trained or list(model.parameters()), FINGERPRINT_TENSORS)
    sums = []
    for parameter in chosen:
        held = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
        sums.append(bit_sum(held.detach().reshape(-1)[:FINGERPRINT_ELEMENTS]))
    return tuple(torch.stack(sums).tolist()) if sums else ()


def _evenly(items: Sequence[nn.Parameter], count: int) -> list[nn.Parameter]:
    step = max(1, len(items) / count)
    return [items[int(index * step)] for index in range(min(count, len(items)))]
