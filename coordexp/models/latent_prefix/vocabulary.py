"""Give a checkpoint latent tokens, the way it is given coordinate tokens.

coordexp model add-latent-tokens --model MODEL --num 16 --output runs/models/with_latents
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from coordexp.codec.latent_vocab import MOST_LATENTS, LatentVocab, latent_token
from coordexp.errors import ConfigError
from coordexp.models.coord_tokens import Expansion, NewTokens, add_tokens

STAMP_NAME = "coordexp_latent_tokens.json"


def add_latent_tokens(
    model_dir: str | Path,
    output_dir: str | Path,
    num_latents: int,
    *,
    seed: int = 0,
    pad_to_multiple_of: int = 64,
) -> Expansion:
    """Copy the checkpoint `model_dir` to `output_dir` with `<|latent_0|>` .. `<|latent_{M-1}|>`.

    Rows of the embedding beyond the tokenizer's entries are used before the matrix grows.

    Raises:
        ConfigError: as `coord_tokens.add_coord_tokens`, or a number of tokens that is not 1 .. 256.
    """
    if not 1 <= num_latents <= MOST_LATENTS:
        raise ConfigError(f"--num {num_latents}: expected 1..{MOST_LATENTS} latent tokens.")

    def check(tok: PreTrainedTokenizerBase) -> LatentVocab:
        return LatentVocab.from_tokenizer(tok, num_latents)

    texts = tuple(latent_token(index) for index in range(num_latents))
    tokens = NewTokens(texts, STAMP_NAME, f"coordexp.models.latent_prefix/1 of {num_latents}", check)
    return add_tokens(model_dir, output_dir, tokens, seed=seed, pad_to_multiple_of=pad_to_multiple_of)
