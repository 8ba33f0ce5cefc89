"""The distribution over coordinate bins: everything several atoms need, computed at most once."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from coordexp.errors import ConfigError, ContractError
from coordexp.losses.sums import math_dtype


class CoordDistribution:
    """p = softmax(z / T) over the K bins of N rows, in float32 (float64 stays float64).

    Arguments:
        logits_NK: float [N, K], the coordinate columns of the logits in bin order.
        temperature: T > 0.
    """

    def __init__(self, logits_NK: Tensor, temperature: float = 1.0):
        if not temperature > 0:
            raise ConfigError(f"temperature = {temperature}: expected a number > 0")
        self.logits_NK = math_dtype(logits_NK)
        self.temperature = temperature

    @property
    def num_bins(self) -> int:
        """K."""
        return self.logits_NK.shape[-1]

    @cached_property
    def bins_K(self) -> Tensor:
        """0, 1, ..., K-1 in the dtype of the logits."""
        return torch.arange(self.num_bins, dtype=self.logits_NK.dtype, device=self.logits_NK.device)

    @cached_property
    def scaled_logits_NK(self) -> Tensor:
        """z / T."""
        return self.logits_NK if self.temperature == 1.0 else self.logits_NK / self.temperature

    @cached_property
    def log_probs_NK(self) -> Tensor:
        """log p, bounded below so that 0 * log 0 is 0 and not nan."""
        return F.log_softmax(self.scaled_logits_NK, -1).clamp_min(torch.finfo(self.logits_NK.dtype).min)

    @cached_property
    def probs_NK(self) -> Tensor:
        """p."""
        return self.log_probs_NK.exp()

    @cached_property
    def expected_bin_N(self) -> Tensor:
        """E_p k, in bins."""
        return self.probs_NK @ self.bins_K

    def distance_NK(self, bins_N: Tensor) -> Tensor:
        """|k - g| in bins, for every bin k and the row's bin g."""
        return (self.bins_K - whole_bins(bins_N).unsqueeze(-1)).abs()

    def expected_distance_N(self, bins_N: Tensor) -> Tensor:
        """E_p |k - g|, in bins: the Wasserstein-1 distance from p to a point mass at g."""
        return (self.probs_NK * self.distance_NK(bins_N)).sum(-1)


def whole_bins(bins_N: Tensor) -> Tensor:
    """`bins_N` as it is; ContractError when its dtype is no integer (nothing is rounded). No host sync."""
    if bins_N.numel() and (bins_N.is_floating_point() or bins_N.is_complex() or bins_N.dtype == torch.bool):
        raise ContractError(
            f"bins of dtype {bins_N.dtype}: expected integers 0..K-1; a bin that is no whole number is an error where "
            "it comes from, and is not rounded here"
        )
    return bins_N
