"""Tokenizer fixtures of the codec tests. What they share with the bench is in tests/fixtures/codec."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "fixtures" / "codec"))

from codec_tokenizers import MAKERS


@pytest.fixture(scope="session")
def tokenizers(real_tok):
    """The demo's, the fused one and Qwen's own, by name."""
    return {name: make() for name, make in MAKERS.items()} | {"real": real_tok}


@pytest.fixture(scope="session", params=[*MAKERS, "real"])
def tok(request, tokenizers):
    """Each of the three tokenizers in turn."""
    return tokenizers[request.param]


@pytest.fixture(scope="session")
def demo(tokenizers):
    return tokenizers["demo"]


@pytest.fixture(scope="session")
def fused(tokenizers):
    return tokenizers["fused"]
