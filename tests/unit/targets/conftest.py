"""Tokenizers of the target tests: the three of the codec tests, and ones with exactly the merges a test names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

sys.path.insert(0, str(Path(__file__).parents[2] / "fixtures" / "codec"))

from codec_tokenizers import MAKERS, with_added_tokens


def tokenizer_with(*merges: str, normalizer: normalizers.Normalizer | None = None):
    """One token per byte, plus one token for each text in `merges` (built from the left, ASCII only)."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    pairs = []
    for text in merges:
        symbols = text.replace(" ", "Ġ")
        for stop in range(2, len(symbols) + 1):
            pair = (symbols[: stop - 1], symbols[stop - 1])
            if pair not in pairs:
                pairs.append(pair)
                vocab["".join(pair)] = len(vocab)
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    if normalizer is not None:
        bpe.normalizer = normalizer
    return with_added_tokens(bpe)


@pytest.fixture(scope="session")
def make_tokenizer():
    return tokenizer_with


@pytest.fixture(scope="session")
def bytewise():
    """A token per byte and per coordinate: tokens and characters are the same thing."""
    return tokenizer_with()


@pytest.fixture(scope="session", params=[*MAKERS, "real"])
def tok(request):
    """The demo's tokenizer, one whose merges join records, separators and the closing brackets, and Qwen's own."""
    return request.getfixturevalue("real_tok") if request.param == "real" else MAKERS[request.param]()
