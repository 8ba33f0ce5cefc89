"""Qwen's own vocabulary as a Hugging Face tokenizer, from the merge ranks that the package `dashscope` holds.

    pip install dashscope
    coordexp model tiny --preset real-vocab --output runs/models/real_vocab

The ids are those of Qwen2, Qwen2.5 and Qwen3 checkpoints: 151,643 byte pairs, then the special and markup tokens up to
151,668. Nothing is downloaded and nothing of the package is imported; one file of it is read.
"""

from __future__ import annotations

import base64
import binascii
import importlib.util
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

from coordexp.codec.coord_vocab import COORD_TOKENS
from coordexp.codec.pieces import token_symbols
from coordexp.errors import ConfigError
from coordexp.models.tiny_tokenizer import CHAT_TEMPLATE, MARKUP_TOKENS, SPECIAL_TOKENS, added_coord_tokens

NUM_BYTE_PAIRS = 151_643
"""Entries of the vocabulary before the special tokens; `<|endoftext|>` has this id."""

NUM_ROWS = 151_936
"""Rows of the embedding of Qwen3-VL checkpoints: 267 more than their tokenizer has entries."""

MODEL_MAX_LENGTH = 262_144

Ranks = Mapping[bytes, int]


def real_tokenizer(*, coord_tokens: bool = False) -> PreTrainedTokenizerBase:
    """Qwen3-VL's tokenizer and chat template; with `coord_tokens`, the 1000 coordinate tokens behind its own.

    Raises ConfigError when the package with the ranks is not installed or holds another vocabulary.
    """
    ranks = read_ranks(ranks_file())
    tok = Qwen2Tokenizer(
        vocab={token_symbols(token): rank for token, rank in ranks.items()},
        merges=merges_of(ranks),  # type: ignore[arg-type]  # pairs, as files of tokenizers have them
        unk_token=None,  # type: ignore[arg-type]
        extra_special_tokens=list(SPECIAL_TOKENS),
        clean_up_tokenization_spaces=False,
        model_max_length=MODEL_MAX_LENGTH,
        chat_template=CHAT_TEMPLATE,
    )
    tok.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKUP_TOKENS])
    tok.eos_token = "<|im_end|>"
    _check_ids(tok)
    if coord_tokens:
        tok.add_tokens(added_coord_tokens(COORD_TOKENS))
    return tok


def ranks_file() -> Path:
    """`qwen.tiktoken` of the installed package; ConfigError when there is none."""
    spec = importlib.util.find_spec("dashscope")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "resources" / "qwen.tiktoken"
        if path.is_file():
            return path
    raise ConfigError(
        "the real vocabulary is read from the package dashscope, which "
        f"{'holds no resources/qwen.tiktoken' if spec else 'is not installed'}: run `pip install dashscope`"
    )


def read_ranks(path: Path) -> dict[bytes, int]:
    """Rank of every byte sequence in a tiktoken file (a line each: base64, space, rank).

    Raises ConfigError unless the ranks are 0 .. 151642, each once.
    """
    try:
        pairs = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise ConfigError(
            f"{path}: is no tiktoken file ({error}); expected lines of base64 and a rank"
        ) from error
    if sorted(ranks.values()) != list(range(NUM_BYTE_PAIRS)):
        raise ConfigError(
            f"{path}: holds {len(ranks)} ranks, expected 0..{NUM_BYTE_PAIRS - 1}, each once; is it Qwen's?"
        )
    return ranks


def merges_of(ranks: Ranks) -> list[tuple[str, str]]:
    """The merge rules of a byte-pair encoding in order, in the alphabet of byte-level BPE: one per sequence of two or
    more bytes."""
    in_order = sorted((rank, token) for token, rank in ranks.items() if len(token) > 1)
    return [_symbol_pair(*_last_merge(token, rank, ranks)) for rank, token in in_order]


def _last_merge(token: bytes, rank: int, ranks: Ranks) -> tuple[bytes, bytes]:
    """The two parts that merge into `token`, found by merging its bytes with lower ranks only."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        lowest, at = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(pairwise(parts)))
        if lowest >= rank:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    if len(parts) != 2:
        raise ConfigError(f"the ranks have no merge that makes {token!r}; are they a byte-pair encoding?")
    return parts[0], parts[1]


def _symbol_pair(first: bytes, second: bytes) -> tuple[str, str]:
    return token_symbols(first), token_symbols(second)


def _check_ids(tok: PreTrainedTokenizerBase) -> None:
    """ConfigError unless special and markup tokens have the ids of Qwen's checkpoints."""
    texts = [*SPECIAL_TOKENS, *MARKUP_TOKENS]
    found = tok.convert_tokens_to_ids(texts)
    wanted = list(range(NUM_BYTE_PAIRS, NUM_BYTE_PAIRS + len(texts)))
    if found != wanted:
        raise ConfigError(
            f"the tokenizer gives {texts[0]}..{texts[-1]} the ids {found}, expected {wanted[0]}..{wanted[-1]}; "
            "is another version of transformers installed?"
        )
