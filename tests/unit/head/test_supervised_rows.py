"""The head sees exactly the supervised rows, and its logits are those of the ordinary forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from coordexp.errors import ConfigError
from coordexp.head.call import head_on_rows, output_head
from coordexp.models.tiny import build_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    path = Path(tmp_path_factory.mktemp("nano")) / "model"
    build_tiny_model(path, preset="nano")
    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float64).eval()


IDS = torch.arange(24).reshape(2, 12) + 40
POSITIONS = torch.tensor([3, 4, 11, 12, 20])  # rows of both sequences, one of them the first


def test_logits_are_the_rows_of_the_full_logits(model):
    full_BTV = model(input_ids=IDS).logits
    with head_on_rows(model, POSITIONS):
        logits_RV = model(input_ids=IDS).logits
    torch.testing.assert_close(logits_RV, full_BTV.flatten(0, 1)[POSITIONS])


def test_only_those_rows_reach_the_head(model):
    shapes = []
    handle = output_head(model).register_forward_hook(
        lambda _m, args, _out: shapes.append(tuple(args[0].shape))
    )
    with head_on_rows(model, POSITIONS):
        model(input_ids=IDS)
    model(input_ids=IDS)
    handle.remove()
    hidden = model.config.text_config.hidden_size
    assert shapes == [(5, hidden), (2, 12, hidden)]


def test_gradients_equal_those_of_selecting_afterwards(model):
    with head_on_rows(model, POSITIONS):
        model(input_ids=IDS).logits.square().sum().backward()
    inside = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(input_ids=IDS).logits.flatten(0, 1)[POSITIONS].square().sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(inside[name], p.grad, rtol=1e-9, atol=1e-9)
    model.zero_grad()


def test_no_rows_at_all_keep_the_graph(model):
    with head_on_rows(model, torch.tensor([], dtype=torch.int64)):
        logits_RV = model(input_ids=IDS).logits
    assert logits_RV.shape == (0, model.config.text_config.vocab_size)
    logits_RV.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_model_without_a_head_is_refused(model):
    with pytest.raises(ConfigError, match="no output embedding"):
        output_head(model.model.visual)
