"""`LatentPrefix`: the text of a prompt -> M vectors in its place.

source encoder   made from the text's embeddings by resampler and adapter, so for any prompt
source static    M free vectors, started from one text
deep             beside either, key and value vectors for every layer
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from coordexp.errors import ConfigError
from coordexp.models.latent_prefix.adapter import Adapter
from coordexp.models.latent_prefix.deep import DeepPrefix, DeepSettings
from coordexp.models.latent_prefix.dropout import drop_latents
from coordexp.models.latent_prefix.resampler import Resampler, rms, segment_means

Source = Literal["encoder", "static"]


@dataclass(frozen=True)
class PrefixSettings:
    """What a prefix is made of; `width`, `heads`, `layers` and `mlp_width` are those of the encoder and its adapter.

    deep: None for a prefix without.
    """

    num_latents: int
    hidden: int
    source: Source = "encoder"
    width: int = 256
    heads: int = 4
    layers: int = 2
    mlp_width: int = 512
    deep: DeepSettings | None = None

    def __post_init__(self) -> None:
        if self.num_latents < 1:
            raise ConfigError(f"a latent prefix of {self.num_latents} vectors; expected at least 1")
        if self.source == "encoder" and self.width % (2 * self.heads):
            raise ConfigError(
                f"the encoder of a latent prefix has width {self.width} and {self.heads} heads; expected a width that "
                f"is a multiple of {2 * self.heads}"
            )


class LatentPrefix(nn.Module):
    """M vectors for each prompt. Computed in float32 at least, whatever autocast says."""

    def __init__(self, settings: PrefixSettings) -> None:
        super().__init__()
        self.settings = settings
        self.resampler: Resampler | None = None
        self.adapter: Adapter | None = None
        self.vectors_MH: nn.Parameter | None = None
        if settings.source == "static":
            self.vectors_MH = nn.Parameter(torch.zeros(settings.num_latents, settings.hidden))
        else:
            self.resampler = Resampler(
                settings.hidden,
                settings.num_latents,
                width=settings.width,
                heads=settings.heads,
                layers=settings.layers,
            )
            self.adapter = Adapter(settings.hidden, width=settings.mlp_width)
        self.deep = None if settings.deep is None else DeepPrefix(settings.deep)

    @torch.no_grad()
    def start_from(self, text_BLH: Tensor, mask_BL: Tensor) -> None:
        """Static vectors start as the segment means of a text, averaged over the samples given. An encoder stays."""
        if self.vectors_MH is not None:
            means_BMH = segment_means(text_BLH.to(self.vectors_MH.dtype), mask_BL, self.settings.num_latents)
            self.vectors_MH.copy_(means_BMH.mean(0))

    def forward(self, text_BLH: Tensor, mask_BL: Tensor, keep_BM: Tensor | None = None) -> Tensor:
        """[B, M, H] in the dtype of the parameters.

        Arguments:
            text_BLH: embeddings of the prompts' texts, padded anywhere.
            mask_BL: bool, which of them are tokens of the text.
            keep_BM: bool, the latents that are kept (`dropout`); the others become zero. None: all.
        """
        with torch.autocast(text_BLH.device.type, enabled=False):
            if self.vectors_MH is not None:
                vectors = self.vectors_MH.expand(text_BLH.shape[0], -1, -1)
            else:
                assert self.resampler is not None
                assert self.adapter is not None
                text_BLH = text_BLH.to(self.resampler.queries_MD.dtype)
                vectors = self.adapter(self.resampler(text_BLH, mask_BL), rms(text_BLH, mask_BL))
            return vectors if keep_BM is None else drop_latents(vectors, keep_BM)
