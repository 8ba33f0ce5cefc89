"""A nano Qwen3-VL and a batch for it, made once per session; one gloo rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.stage1_head import Batch


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from coordexp.models.tiny import build_tiny_model

    path = tmp_path_factory.mktemp("nano") / "model"
    build_tiny_model(path, preset="nano")
    return path


@pytest.fixture(scope="session")
def batch(nano: Path) -> Batch:
    """Two ragged samples with images (see `support.stage1_head.make_batch`); not to be changed."""
    from support.stage1_head import make_batch

    return make_batch(nano)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
