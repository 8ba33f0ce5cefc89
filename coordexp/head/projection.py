"""The head of a language model as plain tensors, and how they are read off its module."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coordexp.errors import ConfigError
from coordexp.losses.columns import CoordColumns

if TYPE_CHECKING:
    from peft.tuners.lora import Linear as LoraLinear


@dataclass(frozen=True)
class HeadProjection:
    """Logits of R rows as a sum of products: hidden @ weight^T and what adapters add to it."""

    hidden_RH: Tensor
    weight_VH: Tensor
    """May be tied to the input embedding."""
    bias_V: Tensor | None = None
    lora_Rr: Tensor | None = None
    """LoRA on the head: scaling * A(dropout(hidden)), with its own graph."""
    lora_weight_Vr: Tensor | None = None
    """LoRA on the head: the weight of B."""
    coord_offset_KH: Tensor | None = None
    """Added to the weight rows of the K coordinate tokens."""

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.weight_VH.shape[0]

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All parts, in the order of the fields."""
        return (
            self.hidden_RH,
            self.weight_VH,
            self.bias_V,
            self.lora_Rr,
            self.lora_weight_Vr,
            self.coord_offset_KH,
        )

    def logits(self, columns: CoordColumns) -> Tensor:
        """[R, V], by ordinary autograd operations."""
        logits_RV = F.linear(self.hidden_RH, self.weight_VH, self.bias_V)
        if self.lora_Rr is not None and self.lora_weight_Vr is not None:
            logits_RV = logits_RV + F.linear(self.lora_Rr, self.lora_weight_Vr)
        if self.coord_offset_KH is not None:
            offset_KH = self.coord_offset_KH.to(self.hidden_RH.dtype)
            offset_RK = F.linear(self.hidden_RH, offset_KH).to(logits_RV.dtype)
            logits_RV = logits_RV.index_add(1, columns.index(logits_RV.device), offset_RK)
        return logits_RV

    def coord_logits(self, columns: CoordColumns) -> Tensor:
        """[R, K]: the coordinate columns of `logits`, by ordinary autograd operations.

        The K rows are copied out of each weight, so that the graph does not hold on to whole (gathered) weights.
        """
        ids_K = columns.index(self.weight_VH.device)
        bias_K = None if self.bias_V is None else self.bias_V.index_select(0, ids_K)
        logits_RK = F.linear(self.hidden_RH, self.weight_VH.index_select(0, ids_K), bias_K)
        if self.lora_Rr is not None and self.lora_weight_Vr is not None:
            logits_RK = logits_RK + F.linear(self.lora_Rr, self.lora_weight_Vr.index_select(0, ids_K))
        if self.coord_offset_KH is not None:
            offset_KH = self.coord_offset_KH.to(self.hidden_RH.dtype)
            logits_RK = logits_RK + F.linear(self.hidden_RH, offset_KH).to(logits_RK.dtype)
        return logits_RK

    def compute_dtype(self) -> torch.dtype:
        """The dtype matrix products run in: autocast's where it is on, else that of the hidden states."""
        device_type = self.hidden_RH.device.type
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return self.hidden_RH.dtype


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
