"""Weights into a vLLM engine, and those it holds, as checksums to compare with those pushed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from coordexp.rollout.weights.policy_model import bit_sum
from coordexp.rollout.weights.sync import Checksum, column_sum, probe_columns, read_checksums


def load_weights(engine: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Replace the weights of a GRPOVllmEngine in this process by a stream of (name in a checkpoint, tensor)."""
    engine.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})


def announce_version(engine: Any, version: int) -> None:
    """Answers say `version` from here on; what was computed with other weights is forgotten."""
    engine.engine.reset_encoder_cache()
    engine.engine.reset_mm_cache()
    engine.engine.reset_prefix_cache()
    engine.engine.set_weight_version(str(version))


@torch.no_grad()
def held_checksums(model: nn.Module, dtype: torch.dtype) -> dict[str, Checksum]:
    """Checksums of all parameters of `dtype`, by the engine's names."""
    return read_checksums(dict(_sums(model, dtype)))


def _sums(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Tensor | None, Tensor | None]]]:
    for prefix, module in model.named_modules():
        multiply = _repacked_product(module)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype != dtype:
                continue
            if name == "weight" and multiply is not None:
                columns = _read_columns(module, multiply)
                yield f"{prefix}.{name}", (None, column_sum(columns))
            else:
                yield f"{prefix}.{name}", (bit_sum(parameter), None)


def _repacked_product(module: nn.Module) -> Callable[..., Tensor] | None:
    """The product of a layer whose kernel keeps a copy of the weight in a layout of its own (CPU builds)."""
    product: Callable[..., Tensor] | None = getattr(module, "cpu_linear", None)
    looks_rows_up = isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    return None if looks_rows_up else product


def _read_columns(module: Any, multiply: Callable[..., Tensor]) -> Tensor:
    """The probed columns of a repacked weight, [columns, out]: products with unit vectors are exact."""
    width = getattr(module, "input_size_per_partition", None) or module.embedding_dim
    columns = probe_columns(width)
    units = torch.zeros(len(columns), width, dtype=module.weight.dtype, device=module.weight.device)
    units[torch.arange(len(columns)), torch.tensor(columns)] = 1.0
    return multiply(units, module.weight, None)


def engine_names(model: Any, names: Collection[str], held: Collection[str]) -> dict[str, str]:
    """Which tensor of the engine each checkpoint tensor goes into; the model's own loading rules."""
    fused = {part: whole for whole, parts in model.packed_modules_mapping.items() for part in parts}
    found = {}
    for name in names:
        mapped = model.hf_to_vllm_mapper.map_name(name) or name
        *path, module, parameter = mapped.split(".")
        candidate = ".".join([*path, fused.get(module, module), parameter])
        found[name] = candidate if candidate in held else mapped
    return found
