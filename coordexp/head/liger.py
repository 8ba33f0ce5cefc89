"""Text rows of the fused head by liger-kernel's fused linear cross-entropy, on CUDA devices.

One Triton pass over the logits takes the place of the several passes of `head.chunk_logits`. It is given the gradient
of the objective with respect to the cross-entropy of each row beforehand (objectives are linear in it), so that its
gradients are final in the forward, as all of the fused head's. Coordinate rows stay with `head.chunk_logits`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coordexp.head.projection import HeadProjection
from coordexp.losses.inputs import LossNeeds, SupervisedRows

logger = logging.getLogger(__name__)

LIGER_DTYPES = (torch.float32, torch.bfloat16)
NEEDED_ARGUMENTS = {
    "token_grad_output",
    "compute_gradients",
    "weight_requires_grad",
    "return_predicted_tokens",
}
"""Of liger-kernel's function; 0.8.5 has them."""


class TextRowsResult(NamedTuple):
    """What a TextKernel returns of r rows."""

    ce_R: Tensor
    """float32 [r]."""
    predicted_R: Tensor
    """int64 [r]: the arg-max of each row."""
    grad_hidden_RH: Tensor | None
    """Of sum(weights_R * ce_R); None without weights_R."""
    grad_weight_VH: Tensor | None


TextKernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], TextRowsResult]
"""(hidden_RH, weight_VH, targets_R, weights_R or None, whether the weight's gradient is wanted)."""


class OnPredicted:
    """An observer of rows that looks at nothing but their arg-max, so that the logits need not exist.

    see: called with the arg-max [r] of some rows, and those rows.
    """

    def __init__(self, see: Callable[[Tensor, SupervisedRows], None]) -> None:
        self.see = see

    def __call__(self, logits_RV: Tensor, rows: SupervisedRows) -> None:
        """The arg-max of logits that do exist."""
        self.see(logits_RV.argmax(-1), rows)


def choose_kernel(head: HeadProjection, needs: LossNeeds, observe: object) -> TextKernel | None:
    """liger-kernel's for a head and an objective that it serves, where it is installed; else None."""
    return liger_kernel() if liger_serves(head, needs, observe, head.hidden_RH.device.type) else None


def liger_serves(head: HeadProjection, needs: LossNeeds, observe: object, device_type: str) -> bool:
    """Can the text rows be computed without their logits, from one product of hidden states and weight?

    Not with LoRA, a bias or coordinate offsets on the head, not where the objective needs their log-odds (text gate) or
    an observer their logits.
    """
    is_one_product = head.bias_V is None and head.lora_Rr is None and head.coord_offset_KH is None
    needs_logits = needs.text_odds or not (observe is None or isinstance(observe, OnPredicted))
    return (
        device_type == "cuda" and is_one_product and not needs_logits and head.compute_dtype() in LIGER_DTYPES
    )


@cache
def liger_kernel() -> TextKernel | None:
    """A TextKernel of the installed liger-kernel; None without one, or with one that lacks NEEDED_ARGUMENTS."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward as forward
    except ImportError:
        return None
    missing = NEEDED_ARGUMENTS - inspect.signature(forward).parameters.keys()
    if missing:
        logger.warning(
            "liger-kernel is not used for text rows: its fused linear cross-entropy lacks %s; 0.8.5 has them.",
            ", ".join(sorted(missing)),
        )
        return None
    return _text_kernel(forward)


def _text_kernel(forward: Callable[..., Any]) -> TextKernel:
    def run(
        hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, weights_R: Tensor | None, weight_grad: bool
    ) -> TextRowsResult:
        ce_R, _, _, predicted_R, grad_hidden_RH, grad_weight_VH, _ = forward(
            hidden_RH,
            weight_VH,
            targets_R,
            reduction="none",
            accum_dtype=torch.float32,
            token_grad_output=weights_R,
            compute_gradients=weights_R is not None,
            weight_requires_grad=weight_grad,
            return_predicted_tokens=True,
        )
        return TextRowsResult(
            ce_R, predicted_R, None if weights_R is None else grad_hidden_RH, grad_weight_VH
        )

    return run
