"""Cross-entropy over the whole vocabulary, for rows whose target is text."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from coordexp.losses.sums import SumCount, math_dtype, sum_count


def cross_entropy_rows(logits_RV: Tensor, targets_R: Tensor) -> Tensor:
    """-log softmax(z)[target], float [R]."""
    return F.cross_entropy(math_dtype(logits_RV), targets_R, reduction="none")


def token_ce(logits_RV: Tensor, targets_R: Tensor, weights_R: Tensor | None = None) -> SumCount:
    """Weighted token cross-entropy: sum of w_t CE_t, and sum of w_t (w_t = 1 without weights).

    Same as: F.cross_entropy(logits, targets, reduction="none") * weights
    logits_RV: float [R, V]; targets_R: int64 [R]; weights_R: float [R], 0 switches a row off.
    """
    ce_R = cross_entropy_rows(logits_RV, targets_R)
    if weights_R is None:
        return sum_count(ce_R)
    weights_R = weights_R.to(ce_R.dtype)
    return SumCount((weights_R * ce_R).sum(), weights_R.sum())
