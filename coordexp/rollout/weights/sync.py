"""The trained weights as a plain checkpoint holds them, and the proof that an engine serves exactly these.

`policy_tensors` streams the effective weights: adapters merged layer by layer into copies, partitioned parameters
gathered, tied matrices under both of their names. A `PushedWeights` notes checksums of what passes through it, and
`differences` compares them with those the engine reports about the tensors it holds afterwards.

A checksum is the sum of the bit patterns of a tensor in the engine's dtype (`bit_sum`): exact, and additive over the
parts of a fused matrix. An engine that has repacked a matrix for its kernels answers for a sample of the columns, which
it reads by multiplying unit vectors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from coordexp.errors import ConfigError, RolloutError
from coordexp.rollout.weights.policy_model import bit_sum, gathered

NUM_PROBED_COLUMNS = 16

FoldModule = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]
"""(module, its own tensors by name) -> tensors of the plain module that computes the same; LoRA is merged before."""


def as_it_is(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The `FoldModule` of models without modules of our own."""
    return tensors


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model (adapter layers stay in it); `model` itself without PEFT.

    Raises:
        ConfigError: the adapter is no part of the weights (prompt tuning).
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise ConfigError(
            f"backend: vllm gets merged weights, which {model.active_peft_config.peft_type} has not; "
            "use backend: hf."
        )
    inner: nn.Module = model.get_base_model()
    return inner


@torch.no_grad()
def policy_tensors(model: nn.Module, fold: FoldModule = as_it_is) -> Iterator[tuple[str, Tensor]]:
    """(name in a checkpoint, tensor) of all effective weights. Tensors may be shared with the model: do not write.

    Under ZeRO-3 all ranks iterate together. A tied matrix comes once for each of its names.

    Raises:
        ConfigError: a weight is quantised.
    """
    for prefix, module in _places(base_model(model)):
        with _merged(module) as tensors:
            plain = module
            while isinstance(plain, BaseTunerLayer):
                plain = plain.get_base_layer()
            for name, tensor in fold(plain, tensors).items():
                if not tensor.is_floating_point():
                    raise ConfigError(
                        f"{prefix}{name} is {tensor.dtype}: backend: vllm cannot take the weights of "
                        "a quantised model; load it unquantised, or use backend: hf."
                    )
                yield prefix + name, tensor.detach()


def has_own_head(model: nn.Module) -> bool:
    """Can the effective head differ from the effective embedding? Then the engine must not tie them."""
    inner: Any = base_model(model)
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    return embedding.weight is not head.weight or not all(_is_plain(module) for module in (embedding, head))


def _is_plain(module: nn.Module) -> bool:
    """Without adapter, and without tensors beside its weight and bias."""
    return not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not (
        set(module._parameters) - {"weight", "bias"}
    )


def _places(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(prefix of the names in a checkpoint, module with tensors of its own), adapter wrappers looked through."""
    if isinstance(module, BaseTunerLayer):
        yield prefix, module
    elif isinstance(module, ModulesToSaveWrapper):
        yield from _places(module.modules_to_save[module.active_adapters[0]], prefix)
    elif isinstance(module, TrainableTokensWrapper):
        yield prefix, module.token_adapter
    else:
        if any(parameter is not None for parameter in module._parameters.values()):
            yield prefix, module
        for name, child in module.named_children():
            yield from _places(child, f"{prefix}{name}.")


@contextmanager
def _merged(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Tensors of a module, whole, with its adapters merged into copies; the module is left bit for bit as it was."""
    if not isinstance(module, BaseTunerLayer):
        with gathered(p for p in module._parameters.values() if p is not None):
            yield {name: p for name, p in module._parameters.items() if p is not None}
        return
    layers: list[Any] = [module]
    while isinstance(layers[-1].base_layer, BaseTunerLayer):
        layers.append(layers[-1].base_layer)
    base = module.get_base_layer()
    with gathered(module.parameters()):
        before = {name: (p.data, p.data.clone()) for name, p in base.named_parameters(recurse=False)}
        for layer in reversed(layers):
            layer.merge()
        merged = {name: p.data.clone() for name, p in base.named_parameters(recurse=False)}
        for layer in layers:
            layer.unmerge()
        for name, parameter in base.named_parameters(recurse=False):
            storage, values = before[name]
            parameter.data = (
                storage  # merging may have replaced it, and flat buffers of the optimizer point into it
            )
            storage.copy_(values)
        yield merged


# --- checksums ---


@dataclass(frozen=True)
class Checksum:
    """Of one tensor, in the dtype of the engine. None: the side that made it could not read that.

    full: `bit_sum` of all elements.
    probed: `bit_sum` of the columns `probe_columns` of a matrix [out, in].
    """

    full: int | None
    probed: int | None

    def __add__(self, other: Checksum) -> Checksum:
        return Checksum(_sum(self.full, other.full), _sum(self.probed, other.probed))

    def agrees(self, other: Checksum) -> bool:
        """Is whatever both sides could read equal?"""
        pairs = [(self.full, other.full), (self.probed, other.probed)]
        readable = [(a, b) for a, b in pairs if a is not None and b is not None]
        return bool(readable) and all(a == b for a, b in readable)


def _sum(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else (a + b + 2**63) % 2**64 - 2**63


def probe_columns(width: int) -> list[int]:
    """Evenly spaced columns of a matrix of `width` columns."""
    count = min(NUM_PROBED_COLUMNS, width)
    return [index * width // count for index in range(count)]


def column_sum(columns: Tensor) -> Tensor:
    """`bit_sum` of columns read off a matrix; negative zero counts as zero, since products do not tell them apart."""
    return bit_sum(columns + 0.0)


class PushedWeights:
    """Passes weights on to an engine and notes their checksums; no host sync until they are asked for."""

    def __init__(self, weights: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> None:
        self._weights = weights
        self._dtype = dtype
        self._sums: dict[str, tuple[Tensor, Tensor | None]] = {}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._weights:
            served = tensor.to(self._dtype)
            probed = column_sum(served[:, probe_columns(served.shape[1])]) if served.ndim == 2 else None
            self._sums[name] = (bit_sum(served), probed)
            yield name, served

    def checksums(self) -> dict[str, Checksum]:
        """Of everything that was passed on, by name."""
        return read_checksums(self._sums)


def read_checksums(sums: Mapping[str, tuple[Tensor | None, Tensor | None]]) -> dict[str, Checksum]:
    """Device sums as numbers, with one transfer."""
    tensors = [tensor for pair in sums.values() for tensor in pair if tensor is not None]
    numbers = iter(torch.stack(tensors).tolist() if tensors else [])
    return {
        name: Checksum(*(None if tensor is None else next(numbers) for tensor in pair))
        for name, pair in sums.items()
    }


def digest(checksums: Mapping[str, Checksum]) -> str:
    """A short name of the weights as a whole."""
    text = "\n".join(f"{name} {checksums[name].full}" for name in sorted(checksums))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Differences:
    """How an engine's weights differ from those pushed; names are the engine's.

    unequal: the checksums differ.  not_pushed: the engine holds it, and nothing was pushed for it.
    unknown: pushed, but the engine has no tensor of that name (a layout of its own): it cannot be checked.
    """

    unequal: Sequence[str]
    not_pushed: Sequence[str]
    unknown: Sequence[str]


def differences(
    pushed: Mapping[str, Checksum], held: Mapping[str, Checksum], engine_names: Mapping[str, str]
) -> Differences:
    """Compare checksums of the pushed tensors with those of the engine's.

    engine_names: name of the engine's tensor that holds each pushed tensor, maybe with others.
    """
    expected: dict[str, Checksum] = {}
    for name, checksum in pushed.items():
        target = engine_names[name]
        expected[target] = expected[target] + checksum if target in expected else checksum
    return Differences(
        unequal=[name for name in held if name in expected and not expected[name].agrees(held[name])],
        not_pushed=[name for name in held if name not in expected],
        unknown=[name for name in expected if name not in held],
    )


def refuse_differences(found: Differences, *, backend: str, version: int, checksum: str) -> None:
    """RolloutError if the engine serves other weights than those pushed."""
    missing = [] if found.unknown else list(found.not_pushed)
    if not found.unequal and not missing:
        return
    parts = []
    if found.unequal:
        parts.append(f"{len(found.unequal)} tensors differ from the trained ones ({_some(found.unequal)})")
    if missing:
        parts.append(f"{len(missing)} were not pushed at all ({_some(missing)})")
    raise RolloutError(
        f"{backend} backend: after the push of policy version {version} (checksum {checksum}) {' and '.join(parts)}. "
        "The engine would answer with other weights than those trained. Check that model and engine have the same "
        "architecture and tied embeddings, and that the installed vLLM is a supported version."
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
