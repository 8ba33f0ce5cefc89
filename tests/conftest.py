"""Qwen's own vocabulary, and a small model on it, made once per session (a few seconds)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def real_tok() -> PreTrainedTokenizerBase:
    """Qwen3-VL's tokenizer and template with the 1000 coordinate tokens (152,669 entries); not to be changed."""
    from coordexp.models.real_vocab import real_tokenizer

    return real_tokenizer(coord_tokens=True)


@pytest.fixture(scope="session")
def real_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of the preset `real-vocab` with coordinate tokens: 152,704 rows, patches of 16, 10M parameters."""
    from coordexp.models.tiny import build_tiny_model

    path = tmp_path_factory.mktemp("real") / "model"
    build_tiny_model(path, preset="real-vocab")
    return path


@pytest.fixture(scope="session")
def real_plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as it comes from the hub: no coordinate tokens, 151,936 rows of which 151,669 are used."""
    from coordexp.models.tiny import build_tiny_model

    path = tmp_path_factory.mktemp("real") / "plain"
    build_tiny_model(path, preset="real-vocab", coord_tokens=False)
    return path
