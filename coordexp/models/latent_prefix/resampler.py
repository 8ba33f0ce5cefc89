"""Text embeddings of any length -> M vectors: their means over M equal parts, plus what learned queries read of all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rms(vectors: Tensor, mask_BL: Tensor | None = None) -> Tensor:
    """Root mean square over all entries of each sample, [B, 1, 1].

    vectors: float [B, L, H].  mask_BL: bool, which vectors count; None: all.
    """
    if mask_BL is None:
        return vectors.square().mean((1, 2), keepdim=True).sqrt()
    weights = mask_BL.to(vectors.dtype).unsqueeze(-1)
    count = weights.sum((1, 2), keepdim=True).clamp(min=1) * vectors.shape[-1]
    return ((vectors.square() * weights).sum((1, 2), keepdim=True) / count).sqrt()


def segment_means(text_BLH: Tensor, mask_BL: Tensor, num_latents: int) -> Tensor:
    """Means [B, M, H] of the text's embeddings over M equal parts of it.

    Of a text of exactly M tokens these are its embeddings themselves, to the bit. A token that two parts share counts
    in both, by its share; a text of fewer tokens gives some of them several times.

    mask_BL: bool, the tokens of the text; at least one a sample.
    """
    index_BL = mask_BL.cumsum(1) - 1  # place of each token in its text, wherever the padding is
    num_B11 = mask_BL.sum(1)[:, None, None]
    latent_1M1 = torch.arange(num_latents, device=text_BLH.device)[None, :, None]
    start = latent_1M1 * num_B11 / num_latents  # in tokens
    stop = (latent_1M1 + 1) * num_B11 / num_latents
    token = index_BL[:, None, :]
    shared = (torch.minimum(stop, token + 1) - torch.maximum(start, token)).clamp(min=0) / (stop - start)
    weights_BML = shared.to(text_BLH.dtype) * mask_BL[:, None, :]
    return weights_BML @ text_BLH.masked_fill(~mask_BL.unsqueeze(-1), 0)


class Resampler(nn.Module):
    """M learned queries read a text by cross-attention; what they read is added to the text's segment means.

    At the start nothing is added: the vectors are the segment means.

    Arguments:
        hidden: H of the language model.
        num_latents: M.
        width: of the attention; a multiple of 2 * heads.
        layers: blocks of cross-attention and a two-layer perceptron.
    """

    def __init__(self, hidden: int, num_latents: int, *, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.num_latents, self.width = num_latents, width
        self.read = nn.Linear(hidden, width)
        self.queries_MD = nn.Parameter(torch.randn(num_latents, width) * 0.5)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.write = nn.Linear(width, hidden)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)

    def forward(self, text_BLH: Tensor, mask_BL: Tensor) -> Tensor:
        """[B, M, H] from embeddings of the text and which of them are tokens of it."""
        scale = rms(text_BLH, mask_BL)
        means_BMH = segment_means(text_BLH, mask_BL, self.num_latents)
        text_BLD = self.read(text_BLH / scale) + _places(mask_BL, self.width, text_BLH.dtype)
        latents_BMD = self.queries_MD + self.read(means_BMH / scale)
        for block in self.blocks:
            latents_BMD = block(latents_BMD, text_BLD, mask_BL)
        added: Tensor = means_BMH + scale * self.write(self.norm(latents_BMD))
        return added


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_latents, self.norm_text, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, latents_BMD: Tensor, text_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        query = self._split(self.query(self.norm_latents(latents_BMD)))
        key, value = map(self._split, self.key_value(self.norm_text(text_BLD)).chunk(2, dim=-1))
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_BL[:, None, None, :])
        latents_BMD = latents_BMD + self.out(read.transpose(1, 2).flatten(2))
        added: Tensor = latents_BMD + self.mlp(self.norm_mlp(latents_BMD))
        return added

    def _split(self, x: Tensor) -> Tensor:
        split: Tensor = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return split


def _places(mask_BL: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Sines and cosines [B, L, width] of the place of each token in its text."""
    place_BL1 = (mask_BL.cumsum(1) - 1).unsqueeze(-1).to(dtype)
    exponent = torch.arange(width // 2, device=mask_BL.device, dtype=dtype) / (width // 2)
    angle = place_BL1 * torch.pow(10000.0, -exponent)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
