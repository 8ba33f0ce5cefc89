"""A nano Qwen3-VL and a handful of scenes, made once per session."""

from __future__ import annotations

from pathlib import Path

import pytest


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
    config = with_overrides(PRESETS["demo"], {"max_objects": 3, "min_side": 10, "max_side": 30})
    generate_shapes(path, config, num_train=8, num_val=4, seed=3)
    return path
