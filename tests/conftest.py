"""What all tests share: a folder for checked records, and Qwen's own vocabulary with a small model on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@pytest.fixture(scope="session", autouse=True)
def records_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where checked records are kept, by tests and the processes they start: not in the user's folder."""
    folder = tmp_path_factory.mktemp("coordexp_cache")
    before = os.environ.get("COORDEXP_CACHE")
    os.environ["COORDEXP_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["COORDEXP_CACHE"]
    else:
        os.environ["COORDEXP_CACHE"] = before


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


@pytest.fixture(scope="session")
def nano_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from coordexp.models.tiny import build_tiny_model

    path = tmp_path_factory.mktemp("assets") / "nano"
    build_tiny_model(path, preset="nano", seed=0)
    return path


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 training and 4 validation scenes of 1 to 3 objects, so that micro-batches are ragged."""
    from coordexp.data.shapes import PRESETS, generate_shapes, with_overrides

    path = tmp_path_factory.mktemp("assets") / "scenes"
    config = with_overrides(PRESETS["pixels"], {"max_objects": 3, "min_side": 10, "max_side": 30})
    generate_shapes(path, config, num_train=8, num_val=4, seed=3)
    return path
