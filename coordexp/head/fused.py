"""Loss and gradients of the head, chunk by chunk, in one pass (see `head.run`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from coordexp.control.halving import Halving
from coordexp.errors import ConfigError
from coordexp.head.chunk_logits import ChunkLogits, coord_only_inputs, gradients, text_only_inputs
from coordexp.head.liger import OnPredicted, TextKernel
from coordexp.head.products import HeadProducts
from coordexp.head.projection import HeadProjection
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import LossInputs, LossNeeds, SupervisedRows

Terms = TypeVar("Terms")
Observer = Callable[[Tensor, SupervisedRows], None]
"""Sees the logits [r, V] of some rows and what they must predict; chunks come in the order of the rows."""

FUSED_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
"""Not float16: gradients are taken before the loss is scaled, and would vanish."""


class FusedHead(Generic[Terms]):
    """One use of the fused head: `loss()` computes everything; `terms` then holds one entry per chunk.

    Arguments: those of `head.run.apply_head`, with the chunk size settled; `text_kernel` takes all text rows at
    once (`head.liger`), None leaves them to the chunks. There must be rows, and columns beside the coordinate
    tokens. pieces: what happens where memory runs out; None, or an `observe` without `restart`: it is raised.
    """

    def __init__(
        self,
        projection: HeadProjection,
        rows: SupervisedRows,
        columns: CoordColumns,
        needs: LossNeeds,
        objective: Callable[[LossInputs], tuple[Tensor, Terms]],
        *,
        chunk_rows: int,
        observe: Observer | None = None,
        text_kernel: TextKernel | None = None,
        pieces: Halving | None = None,
        restart: Callable[[], None] | None = None,
    ):
        self.projection, self.rows, self.columns, self.needs = projection, rows, columns, needs
        self.objective, self.observe, self.chunk_rows = objective, observe, chunk_rows
        self.text_kernel = text_kernel
        self.pieces = pieces if observe is None or restart is not None else None
        self.restart = restart
        self.terms: list[Terms] = []
        self.dtype = projection.compute_dtype()
        if self.dtype not in FUSED_DTYPES:
            raise ConfigError(
                f"custom.head = fused: products in {self.dtype} would lose the gradient, which is taken "
                "before the loss is scaled; use bfloat16 or float32, or custom.head = plain"
            )
        self.math_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32

    def loss(self) -> Tensor:
        """The objective summed over chunks, 0-dim, connected to every tensor of the projection."""
        return _GradientsInForward.apply(  # type: ignore[no-any-return, no-untyped-call]
            self, torch.is_grad_enabled(), *self.projection.tensors()
        )

    def run(self, wanted: list[bool]) -> tuple[Tensor, list[Tensor | None]]:
        """The loss, and its gradient with respect to each wanted tensor of the projection.

        Where memory runs out everything begins anew with smaller chunks: what half a chunk had added is dropped.
        """
        if self.pieces is None:
            return self._pass(wanted, self.chunk_rows)
        largest = min(self.chunk_rows, max(self.rows.num_text, self.rows.num_coord))
        return self.pieces.run(largest, lambda size: self._pass(wanted, size))

    def _pass(self, wanted: list[bool], chunk_rows: int) -> tuple[Tensor, list[Tensor | None]]:
        head = self.projection
        self.terms.clear()
        if self.restart is not None:
            self.restart()
        with torch.autocast(head.hidden_RH.device.type, enabled=False):
            products = HeadProducts(head, self.columns, self.dtype, self.math_dtype, wanted)
            loss = torch.zeros((), dtype=self.math_dtype, device=head.hidden_RH.device)
            if self.text_kernel is not None and self.rows.num_text:
                loss += self._text_at_once(products, self.text_kernel)
            for where, piece in self.rows.chunks(chunk_rows):
                if piece.num_text and self.text_kernel is not None:
                    continue
                evaluate = self._coord_only if self._is_coord_only(piece) else self._whole_vocabulary
                loss += evaluate(products, where, piece)
        return loss, products.grads

    def _is_coord_only(self, piece: SupervisedRows) -> bool:
        """Coordinate rows without gate, mass or cross-entropy need 1000 columns of the head, not all."""
        consecutive = self.columns.start is not None and self.observe is None
        return consecutive and piece.num_text == 0 and not self.needs.coord_full_vocab

    def _whole_vocabulary(self, products: HeadProducts, where: slice, piece: SupervisedRows) -> Tensor:
        logits_rV = products.logits(where)
        if self.observe is not None:
            self.observe(logits_rV, piece)
        chunk = ChunkLogits(logits_rV, piece, self.columns, self.needs)
        loss = self._evaluate(chunk.inputs, products.with_grad)
        if products.with_grad:
            products.add_gradient(chunk.gradient(loss), where)
        return loss.detach()

    def _text_at_once(self, products: HeadProducts, kernel: TextKernel) -> Tensor:
        """All text rows through the kernel: weights of their cross-entropies first, then values and gradients.

        The kernel rounds weights to the dtype of the products; taken relative to the largest, equal ones stay exact.
        """
        where = slice(0, self.rows.num_text)
        rows = self.rows.text_slice(0, self.rows.num_text)
        weights_R = scale = None
        if products.with_grad:
            unknown_R = torch.zeros(
                rows.num_text, dtype=self.math_dtype, device=products.hidden_RH.device
            ).requires_grad_()
            with torch.enable_grad():
                linear, _ = self.objective(text_only_inputs(unknown_R, rows, self.columns, self.needs))
            (grad_R,) = gradients(linear, [unknown_R])
            scale = grad_R.abs().amax().clamp_min(torch.finfo(grad_R.dtype).tiny)
            weights_R = grad_R / scale
        result = kernel(
            products.hidden_RH[where],
            products.weight_VH,
            rows.targets_R,
            weights_R,
            products.wants_weight_gradient,
        )
        if scale is not None:
            products.add_main_gradients(result.grad_hidden_RH, result.grad_weight_VH, where, scale)
        if isinstance(self.observe, OnPredicted):
            self.observe.see(result.predicted_R, rows)
        return self._evaluate(text_only_inputs(result.ce_R, rows, self.columns, self.needs), False).detach()

    def _coord_only(self, products: HeadProducts, where: slice, piece: SupervisedRows) -> Tensor:
        inputs = coord_only_inputs(products.coord_logits(where), piece, self.needs)
        loss = self._evaluate(inputs, products.with_grad)
        if products.with_grad:
            (grad_rK,) = gradients(loss, [inputs.coord_logits_NK])
            products.add_coord_gradient(grad_rK, where)
        return loss.detach()

    def _evaluate(self, inputs: LossInputs, with_grad: bool) -> Tensor:
        with torch.set_grad_enabled(with_grad):
            loss, terms = self.objective(inputs)
        self.terms.append(terms)
        return loss


class _GradientsInForward(torch.autograd.Function):
    """Runs a FusedHead; the gradients it found wait for the factor of the backward pass."""

    @staticmethod
    def forward(ctx: Any, head: FusedHead[Any], with_grad: bool, *tensors: Tensor | None) -> Tensor:
        wanted = [with_grad and t is not None and t.requires_grad for t in tensors]
        loss, ctx.gradients = head.run(wanted)
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_loss,) = grad_outputs
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "the fused head keeps its gradients for one backward pass; use custom.head: plain"
            )
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                gradients[i] = gradient.mul_(grad_loss).to(ctx.dtypes[i])
        return None, None, *gradients
