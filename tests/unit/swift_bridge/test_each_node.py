"""Weights of checkpoints on nodes other than the first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Qwen3Config, Qwen3ForCausalLM

from coordexp.swift_bridge.saving.each_node import written_here


@pytest.fixture
def rank_of_second_node() -> Iterator[None]:
    torch.distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


def weights(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_a_model_writes_its_weights_on_every_node(rank_of_second_node: None, tmp_path: Path) -> None:
    config = Qwen3Config(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(tmp_path / "alone", is_main_process=True)
    assert weights(tmp_path / "alone") == [], "transformers writes them by now: remove written_here"
    with written_here(model):
        model.save_pretrained(tmp_path / "here", is_main_process=True)
        model.save_pretrained(tmp_path / "other rank of the node", is_main_process=False)
    assert weights(tmp_path / "here") == ["model.safetensors"]
    assert weights(tmp_path / "other rank of the node") == []
    assert "should_save_on_this_rank" not in vars(model)
