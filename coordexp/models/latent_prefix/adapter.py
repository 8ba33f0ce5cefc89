"""Vectors of the encoder -> vectors that the language model reads: a residual perceptron at the scale of its text."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coordexp.models.latent_prefix.resampler import rms


class Adapter(nn.Module):
    """Residual two-layer perceptron, brought to the text's root mean square, then a gain and a bias per channel.

    At the start it changes nothing but the scale, and that only of vectors at another scale than the text.
    """

    def __init__(self, hidden: int, *, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.inner, self.outer = nn.Linear(hidden, width), nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.affine = ChannelAffine(hidden)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, vectors_BMH: Tensor, scale_B11: Tensor) -> Tensor:
        """[B, M, H].  scale_B11: root mean square of each sample's text embeddings."""
        added = vectors_BMH + scale_B11 * self.outer(self.act(self.inner(self.norm(vectors_BMH))))
        calibrated: Tensor = self.affine(added * (scale_B11 / rms(added).clamp(min=1e-12)), scale_B11)
        return calibrated


class ChannelAffine(nn.Module):
    """gain * x + bias * scale, for each channel of H; gain 1 and bias 0 at the start."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gain_less_one_H = nn.Parameter(torch.zeros(hidden))
        self.bias_H = nn.Parameter(torch.zeros(hidden))

    def forward(self, vectors: Tensor, scale: Tensor) -> Tensor:
        """[..., H]; weight decay draws both towards no change."""
        return vectors + self.gain_less_one_H * vectors + self.bias_H * scale
