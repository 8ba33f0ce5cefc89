"""The matrix products of the fused head: logits of a range of rows, and the gradients of all parts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coordexp.head.projection import HeadProjection
from coordexp.losses.columns import CoordColumns

WEIGHT_GRAD_ROWS = 16_384
"""Vocabulary rows per piece when half-precision products are added to a float32 weight gradient."""


@dataclass(frozen=True)
class _Product:
    """x @ weight^T for some logit columns, and where the gradients of x and weight are accumulated."""

    x_Rh: Tensor
    weight_Mh: Tensor
    grad_x_Rh: Tensor | None
    grad_weight_Mh: Tensor | None
    coord_only: bool = False
    """The M columns are the K coordinate columns, not the vocabulary."""

    def coord_part(self, columns: CoordColumns) -> _Product:
        """Restricted to the coordinate columns, which must be consecutive."""
        if self.coord_only:
            return self
        grad_weight = None if self.grad_weight_Mh is None else columns.rows(self.grad_weight_Mh)
        return replace(self, weight_Mh=columns.rows(self.weight_Mh), grad_weight_Mh=grad_weight)

    def accumulate(self, grad_rM: Tensor, where: slice) -> None:
        """Add the gradients that follow from the gradient of the product on a range of rows."""
        if self.grad_x_Rh is not None:
            _add_product(self.grad_x_Rh[where], grad_rM, self.weight_Mh)
        if self.grad_weight_Mh is not None:
            _add_product(self.grad_weight_Mh, grad_rM.T, self.x_Rh[where])


class HeadProducts:
    """Products run in `dtype`; logits and gradients are kept in `math_dtype` (float32 or float64).

    Arguments:
        wanted: for every tensor of the projection, whether its gradient is to be computed. `grads` holds
            them, in that order, None where not wanted.
    """

    def __init__(
        self,
        head: HeadProjection,
        columns: CoordColumns,
        dtype: torch.dtype,
        math_dtype: torch.dtype,
        wanted: list[bool],
    ):
        self.columns, self.dtype, self.math_dtype = columns, dtype, math_dtype
        self.with_grad = any(wanted)
        self.grads = [
            torch.zeros_like(t, dtype=math_dtype) if t is not None and want else None
            for t, want in zip(head.tensors(), wanted, strict=True)
        ]
        self._products = self._list_products(head)
        self._bias_V = None if head.bias_V is None else head.bias_V.detach().to(dtype)
        self._grad_bias_V = self.grads[2]
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._vocab_size = head.vocab_size

    def logits(self, where: slice) -> Tensor:
        """Logits of a range of rows, [r, V], in a buffer that the next call overwrites."""
        out_rV = self._buffer(where, self.dtype)
        first, *others = self._products
        torch.mm(first.x_Rh[where], first.weight_Mh.T, out=out_rV)
        for product in others:
            if product.coord_only:
                self.columns.add_(out_rV, product.x_Rh[where] @ product.weight_Mh.T)
            else:
                out_rV.addmm_(product.x_Rh[where], product.weight_Mh.T)
        if self._bias_V is not None:
            out_rV.add_(self._bias_V)
        return out_rV if self.dtype == self.math_dtype else self._buffer(where, self.math_dtype).copy_(out_rV)

    def add_gradient(self, grad_rV: Tensor, where: slice) -> None:
        """Accumulate all gradients that follow from the gradient of `logits(where)`."""
        if self._grad_bias_V is not None:
            self._grad_bias_V += grad_rV.sum(0)
        if grad_rV.dtype != self.dtype:
            grad_rV = self._buffer(where, self.dtype).copy_(grad_rV)
        for product in self._products:
            product.accumulate(self.columns.take(grad_rV) if product.coord_only else grad_rV, where)

    @property
    def hidden_RH(self) -> Tensor:
        """Hidden states of all rows, in the dtype of the products."""
        return self._products[0].x_Rh

    @property
    def weight_VH(self) -> Tensor:
        """The head's weight, in the dtype of the products."""
        return self._products[0].weight_Mh

    @property
    def wants_weight_gradient(self) -> bool:
        """Is the gradient of the head's weight accumulated?"""
        return self._products[0].grad_weight_Mh is not None

    def add_main_gradients(
        self, grad_rH: Tensor | None, grad_weight_VH: Tensor | None, where: slice, scale: Tensor
    ) -> None:
        """Add ready gradients of hidden states and weight, times a 0-dim factor; overwrites them."""
        product = self._products[0]
        if product.grad_x_Rh is not None and grad_rH is not None:
            product.grad_x_Rh[where] += grad_rH.to(self.math_dtype) * scale
        if product.grad_weight_Mh is not None and grad_weight_VH is not None:
            product.grad_weight_Mh.add_(grad_weight_VH.mul_(scale))

    def coord_logits(self, where: slice) -> Tensor:
        """Logits of a range of rows in the coordinate columns only (consecutive), [r, K]."""
        parts = [product.coord_part(self.columns) for product in self._products]
        logits_rK = torch.stack([part.x_Rh[where] @ part.weight_Mh.T for part in parts]).sum(0)
        if self._bias_V is not None:
            logits_rK += self.columns.rows(self._bias_V)
        return logits_rK.to(self.math_dtype)

    def add_coord_gradient(self, grad_rK: Tensor, where: slice) -> None:
        """Accumulate all gradients that follow from the gradient of `coord_logits(where)`."""
        if self._grad_bias_V is not None:
            self.columns.rows(self._grad_bias_V).add_(grad_rK.sum(0))
        grad_rK = grad_rK.to(self.dtype)
        for product in self._products:
            product.coord_part(self.columns).accumulate(grad_rK, where)

    def _list_products(self, head: HeadProjection) -> list[_Product]:
        """hidden @ weight^T first, then LoRA, then the coordinate offset."""
        grad_hidden, grad_weight, _, grad_lora, grad_lora_weight, grad_offset = self.grads
        hidden_RH = self._value(head.hidden_RH)
        products = [_Product(hidden_RH, self._value(head.weight_VH), grad_hidden, grad_weight)]
        if head.lora_Rr is not None and head.lora_weight_Vr is not None:
            x_Rr, weight_Vr = self._value(head.lora_Rr), self._value(head.lora_weight_Vr)
            products.append(_Product(x_Rr, weight_Vr, grad_lora, grad_lora_weight))
        if head.coord_offset_KH is not None:
            offset_KH = self._value(head.coord_offset_KH)
            products.append(_Product(hidden_RH, offset_KH, grad_hidden, grad_offset, coord_only=True))
        return products

    def _value(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.dtype)

    def _buffer(self, where: slice, dtype: torch.dtype) -> Tensor:
        """A [r, V] buffer, allocated for the first (largest) range and reused."""
        num_rows = where.stop - where.start
        if dtype not in self._buffers or self._buffers[dtype].shape[0] < num_rows:
            device = self._products[0].x_Rh.device
            self._buffers[dtype] = torch.empty(num_rows, self._vocab_size, dtype=dtype, device=device)
        return self._buffers[dtype][:num_rows]


def _add_product(out_MN: Tensor, left_MP: Tensor, right_PN: Tensor) -> None:
    """out += left @ right, in place; in pieces of rows where the product's dtype is not out's."""
    if out_MN.dtype == left_MP.dtype:
        out_MN.addmm_(left_MP, right_PN)
        return
    for start in range(0, out_MN.shape[0], WEIGHT_GRAD_ROWS):
        rows = slice(start, start + WEIGHT_GRAD_ROWS)
        out_MN[rows] += left_MP[rows] @ right_PN
