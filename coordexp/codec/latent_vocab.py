"""The latent tokens `<|latent_0|>` .. `<|latent_{M-1}|>` of a tokenizer: the places of a learned prefix in a prompt."""

from __future__ import annotations

from dataclasses import dataclass

from coordexp.codec.coord_vocab import Tokenizer
from coordexp.errors import ConfigError

MOST_LATENTS = 256


def latent_token(index: int) -> str:
    """`<|latent_k|>`; ConfigError unless 0 <= k < MOST_LATENTS."""
    if not 0 <= index < MOST_LATENTS:
        raise ConfigError(f"no latent token {index}: expected 0..{MOST_LATENTS - 1}")
    return f"<|latent_{index}|>"


def latent_text(num_latents: int) -> str:
    """The user message that `num_latents` latent tokens make, one after another."""
    return "".join(latent_token(index) for index in range(num_latents))


@dataclass(frozen=True)
class LatentVocab:
    """Ids of the first M latent tokens; `ids[k]` is the id of `<|latent_k|>`."""

    ids: tuple[int, ...]

    @classmethod
    def from_tokenizer(cls, tok: Tokenizer, num_latents: int) -> LatentVocab:
        """Look the tokens up in `tok`; ConfigError when one is missing or is not encoded as one id."""
        texts = [latent_token(index) for index in range(num_latents)]
        encoded = [tok.encode(text, add_special_tokens=False) for text in texts]
        missing = [text for text, ids in zip(texts, encoded, strict=True) if len(ids) != 1]
        if missing:
            raise ConfigError(
                f"the tokenizer lacks {len(missing)} of {num_latents} latent tokens (the first: {missing[0]}): add "
                f"them with `coordexp model add-latent-tokens --model DIR --num {num_latents} --output DIR`"
            )
        ids = tuple(one[0] for one in encoded)
        if tok.encode(latent_text(num_latents), add_special_tokens=False) != list(ids):
            raise ConfigError(
                "the tokenizer changes the text around latent tokens; add them with lstrip=False, rstrip=False and "
                "normalized=False"
            )
        return cls(ids)

    def __len__(self) -> int:
        return len(self.ids)


def num_latent_tokens(tok: Tokenizer) -> int:
    """How many latent tokens a tokenizer holds, counted from `<|latent_0|>`."""
    number = 0
    while number < MOST_LATENTS and len(tok.encode(latent_token(number), add_special_tokens=False)) == 1:
        number += 1
    return number
