"""The distributions that coordinates were read from, small enough to keep beside an answer.

Of each position the `NUM_ATOMS` most likely bins are kept as they are, and what is left of the mass as that many
quantiles of it, each with the same weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from coordexp.rollout.types import BinDistribution

NUM_ATOMS = 32
LEAST_WEIGHT = 1e-4


def summarise(scores_BV: Tensor, coord_ids_K: Tensor) -> Tensor:
    """What `distribution_of` reads, for every row; on the device, without a look from the host.

    Returns float32 [B, 3 * NUM_ATOMS + 1]: probability of all coordinate tokens; then, of the distribution over them,
    weights and bins of the most likely, and the bins of the quantiles (i + 1/2) / NUM_ATOMS of the rest.
    """
    coord_BK = scores_BV[:, coord_ids_K].double()
    mass_B = (coord_BK.logsumexp(dim=-1) - scores_BV.double().logsumexp(dim=-1)).exp()
    probs_BK = coord_BK.softmax(dim=-1)
    weights_BA, bins_BA = probs_BK.topk(min(NUM_ATOMS, probs_BK.shape[1]), dim=-1)
    rest_cdf_BK = probs_BK.scatter(1, bins_BA, 0.0).cumsum(dim=-1)
    levels_A = (torch.arange(bins_BA.shape[1], device=probs_BK.device) + 0.5) / bins_BA.shape[1]
    quantiles_BA = torch.searchsorted(rest_cdf_BK, levels_A * rest_cdf_BK[:, -1:])
    return torch.cat([mass_B[:, None], weights_BA, bins_BA, quantiles_BA], dim=1).float()


def distribution_of(summary: Sequence[float]) -> BinDistribution:
    """One row of `summarise`, brought to the host."""
    num_atoms = (len(summary) - 1) // 3
    mass, weights = summary[0], summary[1 : 1 + num_atoms]
    bins, quantiles = summary[1 + num_atoms : 1 + 2 * num_atoms], summary[1 + 2 * num_atoms :]
    rest = (1.0 - sum(weights)) / num_atoms
    atoms = [*zip(bins, weights, strict=True), *((k, rest) for k in quantiles)]
    kept = [(int(k), weight) for k, weight in atoms if weight >= LEAST_WEIGHT]
    return BinDistribution(mass, tuple(k for k, _ in kept), tuple(weight for _, weight in kept))


class NotedDistributions(LogitsProcessor):
    """Notes the distribution over the coordinate tokens at every step of `generate`; it must see the raw scores."""

    def __init__(self, coord_ids: Sequence[int], device: torch.device) -> None:
        self._coord_ids = frozenset(coord_ids)
        self._coord_ids_K = torch.tensor(coord_ids, device=device)
        self._summaries: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: [rows, V]."""
        self._summaries.append(summarise(scores, self._coord_ids_K))
        return scores

    def finish(self, answers: Sequence[Sequence[int]]) -> list[tuple[BinDistribution | None, ...]]:
        """For each answer one entry per token, None where that is no coordinate token."""
        rows_BTS = torch.stack(self._summaries, dim=1).tolist()
        return [
            tuple(
                distribution_of(summary) if token in self._coord_ids else None
                for token, summary in zip(answer, rows_TS, strict=False)
            )
            for answer, rows_TS in zip(answers, rows_BTS, strict=True)
        ]
