"""The head of a language model as plain tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from coordexp.losses.columns import CoordColumns


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
