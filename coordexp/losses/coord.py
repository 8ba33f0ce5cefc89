"""Atoms on coordinate slots: rows of logits and their true bins in, SumCount out.

Notation: z logits, C the coordinate ids in bin order, K their number, g the true bin, T temperature,
p = softmax(z[C] / T). All arithmetic is float32 (float64 input stays float64). Functions named `*_rows`
work on a shared `CoordDistribution` and return one value per row; the public atoms sum them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from coordexp.errors import ConfigError, ContractError
from coordexp.losses.columns import CoordColumns, coord_log_odds
from coordexp.losses.sums import SumCount, math_dtype, sum_count

CoordIds = CoordColumns | Sequence[int] | Tensor


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


def gaussian_targets(
    bins_N: Tensor,
    num_bins: int = 1000,
    sigma: float | Tensor = 2.0,
    truncate: float | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Soft targets q(k) ~ exp(-(k - g)^2 / (2 sigma^2)), rows sum to 1.

    Arguments:
        bins_N: int64 [N] true bins in [0, num_bins).
        sigma: width in bins, > 0: one for all rows, or float [N].
        truncate: q is 0 where |k - g| > truncate (bins); None: no cut. 0 gives one-hot rows.
    Returns float [N, num_bins].

    Raises ContractError for bins of a dtype that is no integer.
    """
    if isinstance(sigma, Tensor):
        sigma = sigma.to(dtype).unsqueeze(-1)
    elif not sigma > 0:
        raise ConfigError(f"target_sigma = {sigma}: expected a number of bins > 0")
    distance_NK = torch.arange(num_bins, dtype=dtype, device=bins_N.device) - whole_bins(bins_N).unsqueeze(-1)
    weight_NK = (-0.5 * (distance_NK / sigma) ** 2).exp()
    if truncate is not None:
        weight_NK = weight_NK.masked_fill(distance_NK.abs() > truncate, 0.0)
    return weight_NK / weight_NK.sum(-1, keepdim=True)


def sigma_rows(sigma: float, per_side: float | None, sides_N: Tensor | None) -> float | Tensor:
    """Width of every row's Gaussian target, in bins: max(sigma, per_side * side); `sigma` for all without `per_side`.

    sides_N: float [N], `SupervisedRows.sides_N`.

    Raises ContractError for rows that do not know their boxes.
    """
    if per_side is None:
        return sigma
    if sides_N is None:
        raise ContractError(
            "target_sigma_per_side: these rows do not tell the sides of their boxes (sides_N)"
        )
    return (per_side * sides_N).clamp_min(sigma)


def box_sides(bins_B4: Tensor) -> Tensor:
    """float32 [4 B]: for x1, y1, x2, y2 of every box its width, height, width and height, in bins."""
    width_B, height_B = (bins_B4[:, 2:] - bins_B4[:, :2]).abs().float().unbind(-1)
    return torch.stack([width_B, height_B, width_B, height_B], -1).flatten()


# --- one value per row, from a shared distribution ---------------------------------------------------


def soft_ce_rows(dist: CoordDistribution, target_NK: Tensor) -> Tensor:
    """-sum_k q log p, [N]."""
    return -(target_NK * dist.log_probs_NK).sum(-1)


def w1_rows(dist: CoordDistribution, target_NK: Tensor) -> Tensor:
    """sum_k |CDF_p(k) - CDF_q(k)| / (K - 1), [N] in [0, 1]."""
    return running_sums(dist.probs_NK - target_NK).abs().sum(-1) / (dist.num_bins - 1)


def running_sums(values_NK: Tensor) -> Tensor:
    """`values_NK.cumsum(-1)`; where torch must be deterministic on CUDA, whose cumsum is not, as a product."""
    if not (values_NK.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return values_NK.cumsum(-1)
    with torch.autocast("cuda", enabled=False):
        return values_NK @ _upper_ones(values_NK)


def _upper_ones(like_NK: Tensor) -> Tensor:
    """[K, K]: 1 on and above the diagonal, so that a product with it adds up from the left."""
    num_bins = like_NK.shape[-1]
    return torch.ones(num_bins, num_bins, dtype=like_NK.dtype, device=like_NK.device).triu()


def token_ce_rows(dist: CoordDistribution, bins_N: Tensor) -> Tensor:
    """-log softmax(z[C])[g] at T = 1, [N]."""
    log_probs_NK = dist.log_probs_NK if dist.temperature == 1.0 else F.log_softmax(dist.logits_NK, -1)
    return -_at(log_probs_NK, bins_N)


def el1_rows(dist: CoordDistribution, bins_N: Tensor) -> Tensor:
    """E_p |k - g| / (K - 1), [N] in [0, 1]."""
    return dist.expected_distance_N(bins_N) / (dist.num_bins - 1)


def ehuber_rows(dist: CoordDistribution, bins_N: Tensor, delta: float) -> Tensor:
    """E_p huber(d) with d = |k - g| / (K - 1): d^2 / (2 delta) up to delta, d - delta / 2 beyond. [N]."""
    if not delta > 0:
        raise ConfigError(f"coord_huber_delta = {delta}: expected a number > 0 (in units of the image side)")
    distance_NK = dist.distance_NK(bins_N) / (dist.num_bins - 1)
    huber_NK = torch.where(distance_NK <= delta, distance_NK.square() / (2 * delta), distance_NK - delta / 2)
    return (dist.probs_NK * huber_NK).sum(-1)


def entropy_rows(dist: CoordDistribution) -> Tensor:
    """-sum_k p log p, [N] in [0, log K]."""
    return -(dist.probs_NK * dist.log_probs_NK).sum(-1)


def gate_rows(log_odds_N: Tensor) -> Tensor:
    """-log p_coord from the log-odds of `coord_log_odds`, [N]."""
    return -F.logsigmoid(log_odds_N)


def text_gate_rows(log_odds_N: Tensor) -> Tensor:
    """-log(1 - p_coord) from the log-odds of `coord_log_odds`, [N]; finite for p_coord -> 1."""
    return -F.logsigmoid(-log_odds_N)


def monitor_rows(
    dist: CoordDistribution, bins_N: Tensor, log_odds_N: Tensor | None = None
) -> dict[str, Tensor]:
    """What `coord_monitors` averages, one value per row; `coord_vocab_mass` only where odds are given.

    `expected_bin_mae` holds |E_p k - g|, from which the 90th percentile is taken too.
    """
    scaled_NK = dist.scaled_logits_NK
    top5_N5 = scaled_NK.topk(min(5, dist.num_bins), dim=-1).indices
    rows = {
        "acc_top5": (top5_N5 == bins_N.unsqueeze(-1)).any(-1).to(scaled_NK.dtype),
        "p_gt_mean": _at(dist.probs_NK, bins_N),
        "margin_mean": scaled_NK.amax(-1) - _at(scaled_NK, bins_N),
        "expected_bin_mae": (dist.expected_bin_N - bins_N).abs(),
        "w1_to_delta": dist.expected_distance_N(bins_N),
    }
    if log_odds_N is not None:
        rows["coord_vocab_mass"] = log_odds_N.sigmoid()
    return {name: values_N.detach() for name, values_N in rows.items()}


# --- the atoms ---------------------------------------------------------------------------------------


def coord_soft_ce(
    logits_NK: Tensor,
    bins_N: Tensor,
    *,
    sigma: float,
    truncate: float | None = None,
    temperature: float = 1.0,
) -> SumCount:
    """Cross-entropy of the coordinate logits against a Gaussian around the true bin.

    Same as: q = gaussian_targets(bins, K, sigma, truncate); -(q * log_softmax(z / T)).sum(-1)
    logits_NK: float [N, K]; bins_N: int64 [N] in [0, K). Returns the sum over N, and N.
    """
    dist = CoordDistribution(logits_NK, temperature)
    return sum_count(soft_ce_rows(dist, _targets_for(dist, bins_N, sigma, truncate)))


def coord_w1(
    logits_NK: Tensor,
    bins_N: Tensor,
    *,
    sigma: float,
    truncate: float | None = None,
    temperature: float = 1.0,
) -> SumCount:
    """Wasserstein-1 distance between p and the Gaussian target on ordered bins, divided by K - 1.

    Same as: (softmax(z / T).cumsum(-1) - q.cumsum(-1)).abs().sum(-1) / (K - 1)
    logits_NK: float [N, K]; bins_N: int64 [N] in [0, K). Returns the sum over N, and N.
    """
    dist = CoordDistribution(logits_NK, temperature)
    return sum_count(w1_rows(dist, _targets_for(dist, bins_N, sigma, truncate)))


def coord_token_ce(logits_NK: Tensor, bins_N: Tensor, *, temperature: float = 1.0) -> SumCount:
    """Hard cross-entropy over the K bins, always at T = 1 (`temperature` is accepted and ignored).

    Same as: F.cross_entropy(logits, bins, reduction="sum")
    logits_NK: float [N, K]; bins_N: int64 [N] in [0, K). Returns the sum over N, and N.
    """
    return sum_count(token_ce_rows(CoordDistribution(logits_NK), bins_N))


def coord_el1(logits_NK: Tensor, bins_N: Tensor, *, temperature: float = 1.0) -> SumCount:
    """Expected absolute error in units of the image side.

    Same as: (softmax(z / T) * (arange(K) - bin).abs()).sum(-1) / (K - 1)
    logits_NK: float [N, K]; bins_N: int64 [N] in [0, K). Returns the sum over N, and N.
    """
    return sum_count(el1_rows(CoordDistribution(logits_NK, temperature), bins_N))


def coord_ehuber(logits_NK: Tensor, bins_N: Tensor, *, delta: float, temperature: float = 1.0) -> SumCount:
    """Expected Huber error with d = |k - bin| / (K - 1).

    Same as: (softmax(z / T) * where(d <= delta, d**2 / (2 * delta), d - delta / 2)).sum(-1)
    logits_NK: float [N, K]; bins_N: int64 [N] in [0, K); delta > 0. Returns the sum over N, and N.
    """
    return sum_count(ehuber_rows(CoordDistribution(logits_NK, temperature), bins_N, delta))


def coord_entropy(logits_NK: Tensor, bins_N: Tensor | None = None, *, temperature: float = 1.0) -> SumCount:
    """Entropy of p in nats; minimising it sharpens the distribution. `bins_N` is not looked at.

    Same as: -(softmax(z / T) * log_softmax(z / T)).sum(-1)
    logits_NK: float [N, K]. Returns the sum over N, and N.
    """
    return sum_count(entropy_rows(CoordDistribution(logits_NK, temperature)))


def coord_gate(logits_NV: Tensor, coord_ids: CoordIds, *, temperature: float = 1.0) -> SumCount:
    """Penalty for probability outside the coordinate tokens at coordinate slots.

    Same as: logsumexp(z / T) - logsumexp(z[C] / T) = -log p_coord
    logits_NV: float [N, V]. Returns the sum over N, and N.
    """
    return sum_count(gate_rows(coord_log_odds(logits_NV, CoordColumns.of(coord_ids), temperature)))


def text_gate(logits_NV: Tensor, coord_ids: CoordIds, *, temperature: float = 1.0) -> SumCount:
    """Penalty for probability on the coordinate tokens at text rows.

    Same as: logsumexp(z / T) - logsumexp(z[not C] / T) = -log(1 - p_coord)
    logits_NV: float [N, V]. Returns the sum over N, and N.
    """
    return sum_count(text_gate_rows(coord_log_odds(logits_NV, CoordColumns.of(coord_ids), temperature)))


@torch.no_grad()
def coord_monitors(
    logits_NV: Tensor, bins_N: Tensor, coord_ids: CoordIds, *, temperature: float = 1.0
) -> dict[str, Tensor]:
    """How good the coordinate distributions are; no part of any loss.

    acc_top5: true bin among the 5 likeliest; p_gt_mean: p[g]; margin_mean: max z[C]/T - z[g]/T;
    expected_bin_mae: |E_p k - g| in bins, expected_bin_abs_err_p90 its 90th percentile (linear
    interpolation); w1_to_delta: E_p|k - g| in bins; coord_vocab_mass: probability on the coordinate
    tokens. Means over the N rows, as 0-dim tensors; no key at all when N = 0.
    """
    if logits_NV.shape[0] == 0:
        return {}
    columns = CoordColumns.of(coord_ids)
    dist = CoordDistribution(columns.take(logits_NV), temperature)
    rows = monitor_rows(dist, bins_N, coord_log_odds(logits_NV, columns, temperature))
    means = {name: values_N.mean() for name, values_N in rows.items()}
    return means | {"expected_bin_abs_err_p90": p90(rows["expected_bin_mae"])}


def p90(values_N: Tensor) -> Tensor:
    """90th percentile with linear interpolation between order statistics. N > 0."""
    return values_N.quantile(0.9)


def _targets_for(dist: CoordDistribution, bins_N: Tensor, sigma: float, truncate: float | None) -> Tensor:
    return gaussian_targets(bins_N, dist.num_bins, sigma, truncate, dtype=dist.logits_NK.dtype)


def _at(values_NK: Tensor, bins_N: Tensor) -> Tensor:
    """values[n, bins[n]], [N]."""
    return values_NK.gather(-1, whole_bins(bins_N).long().unsqueeze(-1)).squeeze(-1)
