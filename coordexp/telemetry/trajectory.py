"""How far and how straight the hidden states of a model move from token to token of an answer.

h_t [H] is the row at the head's input from which token t is written. In the diagonal metric g = 1 / (variance + eps):

    v_t = h_{t+1} - h_t                                 velocity
    speed_t = v_t' diag(g) v_t / H
    R_t = |v_{t+1} - v_t| / (|v_t| + eps)               how much it turns; |v| = sqrt(v' diag(g) v)
    LIoR_t = R_t * speed_t

for every t at which all three exist: an answer of T tokens has T - 2.
"""

from __future__ import annotations

import torch
from torch import Tensor


class RunningVariance:
    """Of each of H coordinates over all rows so far (divided by their number), merged piece by piece."""

    def __init__(self, like_H: Tensor) -> None:
        self._count, self._mean_H, self._squares_H = 0, torch.zeros_like(like_H), torch.zeros_like(like_H)

    def add(self, rows_TH: Tensor) -> None:
        """rows_TH: float [T, H], T of 1 or more."""
        mean_H, total = rows_TH.mean(0), self._count + len(rows_TH)
        apart_H = mean_H - self._mean_H
        between_H = apart_H.square() * (self._count * len(rows_TH) / total)
        self._squares_H = self._squares_H + (rows_TH - mean_H).square().sum(0) + between_H
        self._mean_H = self._mean_H + apart_H * (len(rows_TH) / total)
        self._count = total

    def metric_H(self, eps: float) -> Tensor:
        """1 / (variance + eps), [H]."""
        return 1 / (self._squares_H / max(1, self._count) + eps)


def trajectory(hidden_TH: Tensor, metric_H: Tensor, eps: float) -> dict[str, Tensor]:
    """`lior`, `R` and `speed` of one answer, each [T - 2], or [0] of fewer tokens.

    hidden_TH: float [T, H].  metric_H: the diagonal g, [H].
    """
    velocity = hidden_TH.diff(dim=0)
    turn = velocity.diff(dim=0)
    squared_T = (velocity[: len(turn)].square() * metric_H).sum(1)
    speed_T = squared_T / hidden_TH.shape[1]
    R_T = (turn.square() * metric_H).sum(1).sqrt() / (squared_T.sqrt() + eps)
    return {"lior": R_T * speed_T, "R": R_T, "speed": speed_T}
