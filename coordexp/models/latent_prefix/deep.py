"""Key and value vectors for every layer of the language model, beside the vectors in the place of the text.

    output = attention(query, what stands before it) + attention(query, the layer's own vectors)

Each has a softmax of its own, and values start at zero: a new deep prefix adds exactly nothing, as new LoRA weights do,
and its values learn from the first step on. In a cache (PEFT's prefix tuning and cartridges) it would share the softmax
and take mass from pictures and text however it starts; taken from a text, it would say twice what the latent vectors
say. Cache, masks and positions (M-RoPE) are what they are without it; its keys carry no rotary position.

The module reaches the layers as an argument, past the vision tower: gradient checkpointing runs a layer again with the
arguments it had, long after the context in which it ran has ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from coordexp.errors import ConfigError, ContractError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION, READ_BESIDE = "sdpa_with_deep_prefix", "sdpa"
"""Attention that reads a deep prefix where it is given one, and what it is without."""
_ARGUMENT = "deep_prefix"


@dataclass(frozen=True)
class DeepSettings:
    """D vectors `num` in each of `layers`, for each of its key/value `heads`, of size `head_dim`."""

    num: int
    layers: int
    heads: int
    head_dim: int

    @classmethod
    def of(cls, num: int, config: PretrainedConfig) -> DeepSettings:
        """For a language model.  config: of its text."""
        return cls(num, config.num_hidden_layers, config.num_key_value_heads, config.head_dim)


class DeepPrefix(nn.Module):
    """D keys and values for each key/value head of each layer; the same for every prompt."""

    def __init__(self, settings: DeepSettings) -> None:
        super().__init__()
        shape = (settings.layers, settings.heads, settings.num, settings.head_dim)
        self.keys_LKDE = nn.Parameter(torch.randn(shape))  # queries and keys of the model have normed heads
        self.values_LKDE = nn.Parameter(torch.zeros(shape))

    @property
    def values_rms(self) -> Tensor:
        """Root mean square of the values, without gradient; 0 at the start."""
        return self.values_LKDE.detach().square().mean().sqrt()

    def forward(self, layer: int, query_BQTE: Tensor, scaling: float | None) -> Tensor:
        """[B, T, Q, E], what the queries of Q heads read in a layer; Q is a multiple of K."""
        keys_KDE, values_KDE = (
            part[layer].to(query_BQTE.dtype) for part in (self.keys_LKDE, self.values_LKDE)
        )
        num_heads, batch = keys_KDE.shape[0], query_BQTE.shape[0]
        grouped_BKGTE = query_BQTE.unflatten(1, (num_heads, -1))
        read = F.scaled_dot_product_attention(
            grouped_BKGTE.flatten(2, 3),
            keys_KDE.expand(batch, -1, -1, -1),
            values_KDE.expand(batch, -1, -1, -1),
            scale=scaling,
        )
        return read.view_as(grouped_BKGTE).flatten(1, 2).transpose(1, 2)


def _attend(
    module: nn.Module,
    query_BQTE: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    deep_prefix: DeepPrefix | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    output_BTQE, weights = sdpa_attention_forward(
        module, query_BQTE, key, value, attention_mask, scaling=scaling, **kwargs
    )
    if deep_prefix is not None:
        output_BTQE = output_BTQE + deep_prefix(cast(Any, module).layer_idx, query_BQTE, scaling)
    return output_BTQE, weights


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def read_deep(model: nn.Module) -> None:
    """Let the language model of `model` read a deep prefix where it is given one; nothing else changes.

    Raises ConfigError for another attention than sdpa.
    """
    config = _language_model(model).config
    if config._attn_implementation not in (ATTENTION, READ_BESIDE):
        raise ConfigError(
            f"a deep prefix is read beside attn_impl: {READ_BESIDE}, and this model runs with "
            f"{config._attn_implementation}; load it with attn_impl: {READ_BESIDE}."
        )
    config._attn_implementation = ATTENTION


@contextmanager
def deep_in_place(model: nn.Module, deep: DeepPrefix | None) -> Iterator[None]:
    """Within this context the layers of `model` read `deep`; None: nothing.

    Arguments:
        model: made ready by `read_deep`; unwrapped from DDP or DeepSpeed.

    Raises:
        ContractError: the model is not ready, and would take no notice of `deep`.
    """
    if deep is None:
        yield
        return
    reader = _language_model(model)
    if reader.config._attn_implementation != ATTENTION:
        raise ContractError(f"{type(model).__name__} reads no deep prefix; call read_deep first")

    def give(
        _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, _ARGUMENT: deep}

    handle = reader.register_forward_pre_hook(give, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _language_model(model: nn.Module) -> PreTrainedModel:
    return cast("PreTrainedModel", cast("PreTrainedModel", model).get_decoder())
