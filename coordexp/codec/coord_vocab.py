"""The 1000 ordered coordinate tokens `<|coord_0|>` .. `<|coord_999|>` of a tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from coordexp.codec.schema import NUM_BINS
from coordexp.errors import ConfigError

_COORD_TOKEN = re.compile(r"<\|coord_(0|[1-9][0-9]{0,2})\|>")
_ADD_TOKENS_HINT = "add them with `coordexp model add-coord-tokens --model DIR --output DIR`"


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that the codec uses. Byte-level BPE is expected."""

    def __len__(self) -> int: ...
    def convert_tokens_to_ids(self, tokens: Any) -> Any: ...
    def convert_ids_to_tokens(self, ids: Any) -> Any: ...
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


def has_coord_tokens(tok: Tokenizer) -> bool:
    """Whether a tokenizer holds coordinate tokens (its first one; `CoordVocab` looks at all)."""
    found = tok.convert_tokens_to_ids(COORD_TOKENS[0])
    return found is not None and tok.convert_ids_to_tokens(int(found)) == COORD_TOKENS[0]


def coord_token(bin_index: int) -> str:
    """`<|coord_k|>` for bin k; ConfigError unless 0 <= k <= 999."""
    if not 0 <= bin_index < NUM_BINS:
        raise ConfigError(f"no coordinate token for bin {bin_index}: expected 0..{NUM_BINS - 1}")
    return f"<|coord_{bin_index}|>"


def coord_token_bin(text: str) -> int | None:
    """The bin of a text that is exactly one coordinate token, else None (`<|coord_07|>` is none)."""
    match = _COORD_TOKEN.fullmatch(text)
    return int(match[1]) if match else None


COORD_TOKENS = tuple(coord_token(k) for k in range(NUM_BINS))


@dataclass(frozen=True)
class CoordVocab:
    """Ids of the coordinate tokens.

    ids: 1000 distinct token ids; `ids[k]` is the id of bin k. They need not be contiguous.
    """

    ids: tuple[int, ...]
    bin_by_id: dict[int, int] = field(repr=False, compare=False)

    @classmethod
    def from_tokenizer(cls, tok: Tokenizer) -> CoordVocab:
        """Look the tokens up in `tok`.

        Raises ConfigError when a token has no id of its own, or when `tok` does not encode each one as that
        single id inside a coordinate list.
        """
        ids = tok.convert_tokens_to_ids(list(COORD_TOKENS))
        back = [None if i is None else tok.convert_ids_to_tokens(int(i)) for i in ids]
        missing = [token for token, found in zip(COORD_TOKENS, back, strict=True) if token != found]
        if missing:
            raise ConfigError(
                f"{_name_of(tok)} lacks {len(missing)} of {NUM_BINS} coordinate tokens ({_listed(missing)}): "
                f"{_ADD_TOKENS_HINT}"
            )
        vocab = cls(tuple(int(i) for i in ids), {int(i): k for k, i in enumerate(ids)})
        _check_encoding(tok, vocab)
        return vocab

    def bin_of(self, token_id: int) -> int | None:
        """The bin of a token id, or None when the id is no coordinate token."""
        return self.bin_by_id.get(token_id)

    def token(self, bin_index: int) -> str:
        """The text of the token of a bin."""
        return coord_token(bin_index)


def _check_encoding(tok: Tokenizer, vocab: CoordVocab) -> None:
    """ConfigError unless a list of all coordinate tokens encodes to exactly their ids and its separators."""
    separator = tok.encode(", ", add_special_tokens=False)
    expected = list(vocab.ids[:1])
    for token_id in vocab.ids[1:]:
        expected += [*separator, token_id]
    if tok.encode(", ".join(COORD_TOKENS), add_special_tokens=False) == expected:
        return
    split = [
        token
        for token, token_id in zip(COORD_TOKENS, vocab.ids, strict=True)
        if tok.encode(token, add_special_tokens=False) != [token_id]
    ]
    if split:
        raise ConfigError(
            f"{_name_of(tok)} has {len(split)} coordinate tokens in its vocabulary that it does not encode "
            f"as one id ({_listed(split)}): they must be added tokens; {_ADD_TOKENS_HINT}"
        )
    raise ConfigError(
        f"{_name_of(tok)} changes the text around coordinate tokens: `<|coord_0|>, <|coord_1|>` does not "
        "encode as coordinate, separator, coordinate. Add the tokens with lstrip=False, rstrip=False and "
        "normalized=False"
    )


def _listed(tokens: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(tokens[:limit])
    return shown if len(tokens) <= limit else f"{shown}, ... {tokens[-1]}"


def _name_of(tok: object) -> str:
    return f"tokenizer {getattr(tok, 'name_or_path', '') or type(tok).__name__}"
