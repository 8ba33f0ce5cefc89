"""Read a model's head module as a HeadProjection."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from coordexp.errors import ConfigError
from coordexp.head.projection import HeadProjection

if TYPE_CHECKING:
    from peft.tuners.lora import Linear as LoraLinear


def projection_of(head: nn.Module, hidden_RH: Tensor) -> HeadProjection:
    """The head as tensors, with gradients to everything that is trained.

    Arguments:
        head: `model.get_output_embeddings()`: a Linear (tied or not), PEFT's LoRA on one, or PEFT's trained
            copy of one (`modules_to_save`). Its weights must be gathered (DeepSpeed ZeRO-3). A subclass of
            Linear with a parameter `coord_offset_KH` adds it to the weight rows of the coordinate tokens.
        hidden_RH: hidden states of the supervised rows, in their order.
    Raises ConfigError for a head that is not a sum of such products (quantised, DoRA, ...).
    """
    if type(head).__module__.startswith("peft."):
        from peft.tuners.lora import Linear as LoraLinear
        from peft.utils import ModulesToSaveWrapper

        if isinstance(head, ModulesToSaveWrapper):
            trained = head.modules_to_save[str(head.active_adapter)]
            return projection_of(head.original_module if head.disable_adapters else trained, hidden_RH)
        if isinstance(head, LoraLinear):
            return _lora_projection(head, hidden_RH)
    return _linear_projection(head, hidden_RH)


def _linear_projection(head: nn.Module, hidden_RH: Tensor) -> HeadProjection:
    offset_KH = getattr(head, "coord_offset_KH", None)
    if isinstance(head, nn.Linear) and isinstance(offset_KH, nn.Parameter):
        return HeadProjection(hidden_RH, head.weight, head.bias, coord_offset_KH=offset_KH)
    linear = _as_linear(head)
    return HeadProjection(hidden_RH, linear.weight, linear.bias)


def _lora_projection(head: LoraLinear, hidden_RH: Tensor) -> HeadProjection:
    """W h + sum over active adapters of B(scaling A(dropout(h))), all B side by side in one product."""
    base = _linear_projection(head.get_base_layer(), hidden_RH)
    names = [name for name in head.active_adapters if name in head.lora_A]
    if head.disable_adapters or head.merged or not names:
        return base
    low_rank: list[Tensor] = []
    weights: list[Tensor] = []
    for name in names:
        down, up = _as_linear(head.lora_A[name]), _as_linear(head.lora_B[name])
        if name in head.lora_variant or up.bias is not None:
            raise ConfigError(
                f"custom.head = fused cannot use the LoRA adapter {name!r} of the head: it is more than "
                "B(A(x)) (DoRA, a bias, ...); use custom.head = plain"
            )
        x_RH = head.lora_dropout[name](hidden_RH.to(down.weight.dtype))
        low_rank.append(down(x_RH) * head.scaling[name])
        weights.append(up.weight)
    return replace(base, lora_Rr=torch.cat(low_rank, dim=-1), lora_weight_Vr=torch.cat(weights, dim=-1))


def _as_linear(module: nn.Module) -> nn.Linear:
    """Exactly nn.Linear: quantised layers are subclasses whose weight is no matrix of the product."""
    if isinstance(module, nn.Linear) and type(module) is nn.Linear:
        return module
    raise ConfigError(
        f"custom.head = fused cannot use a head of type {type(module).__module__}.{type(module).__name__}: "
        "expected torch.nn.Linear, LoRA on one, or modules_to_save; use custom.head = plain"
    )
