"""Supervised rows of a dumped forward in float64, and sums by key."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Sums:
    """(sum, count) by key, added up over the forwards of all ranks."""

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, key: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        self.sums[key] += float(total.detach()) if isinstance(total, Tensor) else float(total)
        self.counts[key] += float(count)

    def count(self, key: str, number: float) -> None:
        """A counter: its value is the sum."""
        self.sums[key] += number
        self.counts[key] = 1.0

    def values(self) -> dict[str, float]:
        """Sum over count; keys that nothing was counted for are absent."""
        return {key: self.sums[key] / self.counts[key] for key in self.sums if self.counts[key] > 0}


def on_line(step: int, number: float | Sequence[Sequence[float]]) -> float:
    """A number of the configuration at an optimizer step: itself, or what its points [[step, number], ...] say."""
    if isinstance(number, (int, float)):
        return float(number)
    steps, numbers = zip(*number, strict=True)
    return float(np.interp(step, steps, numbers))


def with_weights(
    settings: Mapping[str, Any], step: int, knobs: Mapping[str, float], name: str, nested: str | None = None
) -> dict[str, Any]:
    """Settings with the weights that a step runs: the configured ones, or a controller's, times their warm-up.

    name: in front of the names of knobs.  nested: where further weights stand, and are named like those beside it.
    """
    warmup = settings.get("warmup") or {}

    def in_force(key: str, value: Any) -> Any:
        is_weight = key == "weight" or key.endswith("_weight")
        return knobs.get(f"{name}.{key}", value) * on_line(step, warmup.get(key, 1.0)) if is_weight else value

    found = {key: in_force(key, value) for key, value in settings.items()}
    if nested is not None:
        found[nested] = {key: in_force(key, value) for key, value in settings[nested].items()}
    return found


def target_widths(settings: Mapping[str, Any], step: int, sides_N: Tensor | None) -> float | Tensor:
    """Sigma of the soft targets at a step: one, or float64 [N] where it follows the boxes."""
    sigma, per_side = on_line(step, settings["target_sigma"]), settings.get("target_sigma_per_side")
    if per_side is None or sides_N is None:
        return sigma
    return torch.clamp(on_line(step, per_side) * sides_N.double(), min=sigma)


@dataclass(frozen=True)
class Rows:
    """Supervised rows of a forward, float64."""

    logits_RV: Tensor
    targets_R: Tensor
    num_text: int
    bins_N: Tensor
    ids_K: Tensor
    raw: Mapping[str, Any]

    @classmethod
    def of(cls, rows: Mapping[str, Any], logits_SV: Tensor, ids_K: Tensor) -> Rows:
        return cls(
            logits_SV[rows["positions_R"]], rows["targets_R"], rows["num_text"], rows["bins_N"], ids_K, rows
        )

    def detached(self) -> Rows:
        """The same without a graph."""
        return replace(self, logits_RV=self.logits_RV.detach())

    @property
    def ce_R(self) -> Tensor:
        return F.cross_entropy(self.logits_RV, self.targets_R, reduction="none")

    def coord(self, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinate logits [N, K] over T, their log-softmax, and -log of the coordinate mass [N]."""
        z_NV = self.logits_RV[self.num_text :] / temperature
        z_NK = z_NV[:, self.ids_K]
        return z_NK, z_NK.log_softmax(-1), z_NV.logsumexp(-1) - z_NK.logsumexp(-1)

    def terms(self, temperature: float, sigma: float | Tensor, truncate: float | None) -> dict[str, Tensor]:
        """Per coordinate row: the terms and monitors of the distribution. sigma: of all rows, or float64 [N]."""
        z_NK, logp_NK, gate_N = self.coord(temperature)
        num_bins = z_NK.shape[-1]
        k, g = torch.arange(num_bins, dtype=torch.float64), self.bins_N.double()[:, None]
        p_NK = logp_NK.exp()
        width = sigma[:, None] if isinstance(sigma, Tensor) else sigma
        q_NK = torch.exp(-((k - g) ** 2) / (2 * width**2))
        q_NK = q_NK if truncate is None else q_NK * ((k - g).abs() <= truncate)
        q_NK = q_NK / q_NK.sum(-1, keepdim=True)
        at_g = self.bins_N[:, None]
        hard = self.logits_RV[self.num_text :][:, self.ids_K].log_softmax(-1)
        z_g = z_NK.gather(1, at_g).squeeze(1)
        expected = (p_NK * k).sum(-1)
        return {
            "soft_ce": -(q_NK * logp_NK).sum(-1),
            "w1": (p_NK.cumsum(-1) - q_NK.cumsum(-1)).abs().sum(-1) / (num_bins - 1),
            "ce": -hard.gather(1, at_g).squeeze(1),
            "gate": gate_N,
            "entropy": -(p_NK * logp_NK).sum(-1),
            "el1": (p_NK * (k - g).abs()).sum(-1) / (num_bins - 1),
            "acc_top5": (z_NK > z_g[:, None]).sum(-1).lt(5).double(),
            "p_gt_mean": p_NK.gather(1, at_g).squeeze(1),
            "margin_mean": z_NK.max(-1).values - z_g,
            "expected_bin_mae": (expected - g.squeeze(1)).abs(),
            "w1_to_delta": (p_NK * (k - g).abs()).sum(-1),
            "coord_vocab_mass": torch.exp(-gate_N),
        }
