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
from coordexp.losses.columns import CoordColumns

LEAST_MASS = 0.5
"""The coordinate tokens must hold more than this much of the probability for a position to be a coordinate."""
ROUNDING = 0.01
"""What float32 may do to the difference of two scores."""
SMALL = 1_000_000
"""Scores of a step, up to which their softmax costs less than to find out who needs it."""


def read_coords(logits_NK: Tensor, how: Readout) -> Tensor:
    """The bin that stands for each distribution softmax(logits) over the K ordered bins.

    how: `argmax`, the mode; `median`, the first bin at which the distribution function reaches 1/2, a point of least
        expected absolute error; `expectation`, the mean, rounded.

    Returns int64 [N].  Raises ValueError for another `how`.
    """
    if how == "argmax":
        return logits_NK.argmax(dim=-1)
    probs_NK = logits_NK.softmax(
        dim=-1, dtype=torch.float64
    )  # backends differ in float32: sums of it must not
    if how == "median":
        return (probs_NK.cumsum(dim=-1) < 0.5).sum(dim=-1)
    if how == "expectation":
        bins_K = torch.arange(probs_NK.shape[-1], device=probs_NK.device, dtype=probs_NK.dtype)
        return (probs_NK @ bins_K).round().long()
    raise ValueError(f"how is {how!r}: expected argmax, median or expectation")


def force_readout(scores_BV: Tensor, columns: CoordColumns, how: Readout) -> Tensor:
    """Make the token of `how` the only possible one in the rows that mean a coordinate, in place.

    A row does where the coordinate tokens hold more than `LEAST_MASS` of the probability. On a CPU, where passes over
    the vocabulary are dear and a look at the values is not, only rows that mean one are read and written. Elsewhere no
    row is looked at from the host.
    """
    if scores_BV.device.type != "cpu":
        return force_masked(scores_BV, columns, how)
    rows_R = _rows_of_coordinates(scores_BV, columns)
    if len(rows_R):
        chosen_R = read_coords(_taken(columns.take(scores_BV), rows_R), how)
        scores_BV.index_fill_(0, rows_R, float("-inf"))
        scores_BV[rows_R, columns.index(scores_BV.device)[chosen_R]] = 0.0
    return scores_BV


def _rows_of_coordinates(scores_BV: Tensor, columns: CoordColumns) -> Tensor:
    """Ascending rows that mean a coordinate.  int64 [R]"""
    if scores_BV.numel() <= SMALL:
        return _rows_of_mass(scores_BV, columns)
    rows_R = _may_mean_a_coordinate(scores_BV, columns.take(scores_BV)).nonzero().flatten()
    return rows_R[_rows_of_mass(_taken(scores_BV, rows_R), columns)] if len(rows_R) else rows_R


def _rows_of_mass(scores_BV: Tensor, columns: CoordColumns) -> Tensor:
    mass_B = columns.take(scores_BV.softmax(dim=-1)).sum(dim=-1)
    return (mass_B > LEAST_MASS).nonzero().flatten()


def _may_mean_a_coordinate(scores_BV: Tensor, coord_BK: Tensor) -> Tensor:
    """False where the mass of the K coordinate tokens cannot be more than `LEAST_MASS`, told without sums of exps.

    Together they are at most K times as likely as the likeliest of them. The others are at least as likely as any one
    of them, and at least as their number times their geometric mean (Jensen).  bool [B]
    """
    num_others = scores_BV.shape[1] - coord_BK.shape[1]
    others_B = scores_BV.amax(dim=-1)
    if num_others:
        mean_B = (scores_BV.sum(dim=-1) - coord_BK.sum(dim=-1)) / num_others
        others_B = torch.maximum(others_B, mean_B + math.log(num_others))
    margin = math.log(coord_BK.shape[1] * (1 - LEAST_MASS) / LEAST_MASS) + ROUNDING
    return others_B <= coord_BK.amax(dim=-1) + margin


def _taken(values_BV: Tensor, rows_R: Tensor) -> Tensor:
    """Rows of `values_BV`, which are not copied where all are taken. rows_R: ascending."""
    return values_BV if len(rows_R) == len(values_BV) else values_BV[rows_R]


def force_masked(scores_BV: Tensor, columns: CoordColumns, how: Readout) -> Tensor:
    """As `force_readout`, by masks over all rows."""
    coord_BK = columns.take(scores_BV)
    mass_B = coord_BK.float().logsumexp(dim=-1) - scores_BV.float().logsumexp(dim=-1)
    is_coord_B1 = (mass_B > math.log(LEAST_MASS)).unsqueeze(1)
    chosen_B1 = columns.index(scores_BV.device)[read_coords(coord_BK, how)].unsqueeze(1)
    kept_B1 = scores_BV.gather(1, chosen_B1)
    scores_BV.masked_fill_(is_coord_B1, float("-inf"))
    return scores_BV.scatter_(1, chosen_B1, kept_B1.masked_fill(is_coord_B1, 0.0))


class CoordReadout(LogitsProcessor):
    """Writes coordinates as `how` reads them. For transformers' `generate`; it must see the model's own scores."""

    def __init__(self, how: Readout, coord_ids: Sequence[int]) -> None:
        self._how = how
        self._columns = CoordColumns(coord_ids)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: [rows, V]."""
        return force_readout(scores, self._columns, self._how)
