"""The vectors of prompts outside training: made by a trained encoder, free ones, or those of one exported prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from coordexp.codec.coord_vocab import Tokenizer
from coordexp.codec.latent_vocab import LatentVocab
from coordexp.errors import ConfigError
from coordexp.models.latent_prefix.deep import DeepPrefix, read_deep
from coordexp.models.latent_prefix.dropout import keep_mask, prompt_key
from coordexp.models.latent_prefix.folder import SavedPrefix, build_deep, build_prefix, check_base
from coordexp.models.latent_prefix.prefix import LatentPrefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class PromptVectors:
    """What stands for the text of a prompt.

    latent_ids_M: int64, of the latent tokens.  keep_prob: of the vectors; 1 keeps all.
    prefix: makes them of a text; None: `vectors_MH` are those of `prompt` alone.
    deep: what the layers of the model read beside them; None: nothing.
    """

    tok: Tokenizer
    latent_ids_M: Tensor
    keep_prob: float
    prefix: LatentPrefix | None
    vectors_MH: Tensor | None
    prompt: str | None = None
    deep: DeepPrefix | None = None

    @classmethod
    def of(
        cls,
        saved: SavedPrefix,
        model: nn.Module,
        tok: Tokenizer,
        *,
        source: str | Path,
        keep_prob: float | None = None,
    ) -> PromptVectors:
        """What a folder holds, for `model`, in evaluation mode and on its device; the model can read it then.

        source: the folder, which errors name.
        keep_prob: in place of the one it was trained with; of an exported prompt, whose vectors are settled, none.

        Raises ConfigError for another base model, a tokenizer without the latent tokens, or an attention that reads no
        deep prefix.
        """
        check_base(saved, model, tok, source=source)
        weight_VH = cast("PreTrainedModel", model).get_input_embeddings().weight
        assert isinstance(weight_VH, Tensor)
        device = weight_VH.device
        ids_M = torch.tensor(LatentVocab.from_tokenizer(tok, saved.settings.num_latents).ids, device=device)
        deep = build_deep(saved)
        if deep is not None:
            read_deep(model)
            deep.to(device).eval().requires_grad_(False)
        if saved.vectors_MH is not None:
            if keep_prob is not None:
                raise ConfigError(
                    f"{source}: holds the vectors of one prompt, as they were exported; a keep probability has no "
                    "effect on them any more. Give it to `coordexp model export-prefix`."
                )
            return cls(tok, ids_M, 1.0, None, saved.vectors_MH.to(device), saved.prompt, deep)
        prefix = build_prefix(saved, source=source).to(device).eval().requires_grad_(False)
        kept = saved.keep_prob if keep_prob is None else keep_prob
        return cls(tok, ids_M, kept, prefix, None, deep=deep)

    @property
    def num_latents(self) -> int:
        """M."""
        return len(self.latent_ids_M)

    def __call__(self, embedding: nn.Module, texts: Sequence[str]) -> Tensor:
        """float [S, M, H], the vectors of each text.

        embedding: of the model's tokens.

        Raises ConfigError for another text than the exported vectors stand for.
        """
        if self.vectors_MH is not None:
            other = next((text for text in texts if text != self.prompt), None)
            if other is not None:
                raise ConfigError(f"the vectors stand for {self.prompt!r}, and the question is {other!r}.")
            return self.vectors_MH.expand(len(texts), -1, -1)
        assert self.prefix is not None
        distinct = list(dict.fromkeys(texts))
        ids = [self.tok.encode(text, add_special_tokens=False) for text in distinct]
        length = max(map(len, ids))
        device = self.latent_ids_M.device
        ids_BL = torch.zeros(len(ids), length, dtype=torch.int64, device=device)
        mask_BL = torch.zeros(len(ids), length, dtype=torch.bool, device=device)
        for row, one in enumerate(ids):
            ids_BL[row, : len(one)] = torch.tensor(one)
            mask_BL[row, : len(one)] = True
        keep_BM = keep_mask([prompt_key(one) for one in ids], self.num_latents, self.keep_prob)
        vectors_BMH: Tensor = self.prefix(embedding(ids_BL), mask_BL, keep_BM.to(device))
        place = {text: index for index, text in enumerate(distinct)}
        return vectors_BMH[torch.tensor([place[text] for text in texts], device=device)]


def exported(saved: SavedPrefix, vectors: PromptVectors, embedding: nn.Module, prompt: str) -> SavedPrefix:
    """The vectors of one prompt, to be kept without what made them; a deep prefix stays beside them."""
    with torch.no_grad():
        vectors_MH = vectors(embedding, [prompt])[0]
    return replace(
        saved, prompt=prompt, weights=saved.deep_weights, vectors_MH=vectors_MH, keep_prob=vectors.keep_prob
    )
