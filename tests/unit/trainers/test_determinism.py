"""When `custom.deterministic: auto` is on, and what it switches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from coordexp.trainers.start.determinism import dropouts, settle

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


class Configured(nn.Module):
    """A model whose configuration asks for a dropout that is no module."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        from transformers import LlamaConfig

        self.config = LlamaConfig(attention_dropout=probability)


@pytest.mark.parametrize(
    ("model", "noise", "found"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)), None, []),
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), None, ["1: 0.1"]),
        (Configured(0.0), None, []),
        (Configured(0.2), None, ["config.attention_dropout: 0.2"]),
        (nn.Linear(2, 2), 5.0, []),
    ],
)
def test_auto_is_on_where_nothing_draws_at_random(model, noise, found):
    assert list(dropouts(model)) == found
    is_on = settle("auto", model, device=CPU, noise=noise)
    assert is_on is (not found and noise is None)
    assert torch.are_deterministic_algorithms_enabled() is is_on


def test_what_is_written_decides():
    assert settle(True, nn.Dropout(0.5), device=CPU)
    torch.use_deterministic_algorithms(False)
    assert not settle(False, nn.Linear(1, 1), device=CPU)
    assert not torch.are_deterministic_algorithms_enabled()


def test_auto_warns_of_an_operation_on_an_accelerator_that_true_refuses(caplog):
    settle("auto", nn.Linear(1, 1), device=torch.device("cuda"))
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert "It costs time" in caplog.text
    settle(True, nn.Linear(1, 1), device=torch.device("cuda"))
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
