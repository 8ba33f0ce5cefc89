"""Which bin is written where the model means a coordinate: a statistic of its distribution over the ordered bins.

Greedy decoding writes the most likely bin. The bins are ordered, so a distribution over them says more: its median is
the bin of least expected distance, its mean the bin of least expected squared distance. What is written is what later
tokens are conditioned on, so no second pass is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from coordexp.config.schema.rollout import Readout

LEAST_MASS = 0.5
"""The coordinate tokens must hold more than this much of the probability for a position to be a coordinate."""


def read_coords(logits_NK: Tensor, how: Readout) -> Tensor:
    """The bin that stands for each distribution softmax(logits) over the K ordered bins.

    how: `argmax`, the mode; `median`, the first bin at which the distribution function reaches 1/2, a point of least
        expected absolute error; `expectation`, the mean, rounded.

    Returns int64 [N].  Raises ValueError for another `how`.
    """
    if how == "argmax":
        return logits_NK.argmax(dim=-1)
    probs_NK = logits_NK.double().softmax(dim=-1)  # backends differ in float32: sums of it must not
    if how == "median":
        reached_NK = probs_NK.cumsum(dim=-1) >= 0.5
        return reached_NK.to(torch.int8).argmax(dim=-1)
    if how == "expectation":
        bins_K = torch.arange(probs_NK.shape[-1], device=probs_NK.device, dtype=probs_NK.dtype)
        return (probs_NK @ bins_K).round().long()
    raise ValueError(f"how is {how!r}: expected argmax, median or expectation")


def coord_mass_is_large(scores_BV: Tensor, coord_BK: Tensor) -> Tensor:
    """Whether the coordinate tokens hold more than `LEAST_MASS` of the probability.  bool [B]

    coord_BK: their columns of `scores_BV`.
    """
    mass_B = coord_BK.float().logsumexp(dim=-1) - scores_BV.float().logsumexp(dim=-1)
    return mass_B > math.log(LEAST_MASS)


def force_readout(scores_BV: Tensor, coord_ids_K: Tensor, how: Readout) -> Tensor:
    """Make the token of `how` the only possible one in the rows that mean a coordinate, in place.

    coord_ids_K: ids of the coordinate tokens in the order of the bins.  No row is looked at from the host.
    """
    coord_BK = scores_BV[:, coord_ids_K]
    is_coord_B1 = coord_mass_is_large(scores_BV, coord_BK).unsqueeze(1)
    chosen_B1 = coord_ids_K[read_coords(coord_BK, how)].unsqueeze(1)
    kept_B1 = scores_BV.gather(1, chosen_B1)
    scores_BV.masked_fill_(is_coord_B1, float("-inf"))
    return scores_BV.scatter_(1, chosen_B1, kept_B1.masked_fill(is_coord_B1, 0.0))


class CoordReadout(LogitsProcessor):
    """Writes coordinates as `how` reads them. For transformers' `generate`; it must see the model's own scores."""

    def __init__(self, how: Readout, coord_ids: Sequence[int], device: torch.device) -> None:
        self._how = how
        self._coord_ids_K = torch.tensor(coord_ids, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: [rows, V]."""
        return force_readout(scores, self._coord_ids_K, self._how)
