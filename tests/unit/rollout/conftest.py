"""A nano Qwen3-VL with its training template, and a few questions about scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.rollout import load_policy, read_requests

from coordexp.rollout.types import RolloutRequest


class Policy(NamedTuple):
    model: Any
    template: Any
    model_dir: Path


@pytest.fixture(scope="session")
def nano_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from coordexp.models.tiny import build_tiny_model

    path = tmp_path_factory.mktemp("rollout") / "nano"
    build_tiny_model(path, preset="nano", seed=0)
    return path


@pytest.fixture
def policy(nano_dir: Path) -> Policy:
    """In training mode, as a trainer holds it."""
    return Policy(*load_policy(nano_dir), nano_dir)


@pytest.fixture(scope="session")
def requests(tmp_path_factory: pytest.TempPathFactory) -> list[RolloutRequest]:
    """7 questions of different lengths, seeded."""
    from coordexp.data.shapes import PRESETS, generate_shapes

    root = tmp_path_factory.mktemp("rollout") / "scenes"
    generate_shapes(root, PRESETS["pixels"], num_train=0, num_val=7, seed=5)
    return read_requests(root / "val.jsonl")
