"""The price of self-context forwards on two made-up models: a second forward helps one, and not the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coordexp.config.schema.training import SoftctxEconomy
from coordexp.control.controllers.bank import ControllerBank
from coordexp.control.controllers.decisions import CONFIDENCE, TAX_ONLY, WIN, Decision
from coordexp.control.controllers.economy import ForwardsSeen
from coordexp.metrics.keys_control import SOFTCTX_ENTROPY_CHANGE, SOFTCTX_GAIN
from coordexp.models.self_context import CoordSlots, SelfContext, run_self_context
from coordexp.trainers.step.runner import forwards_worth

K, TRUE = 16, 5
SLOTS_N = torch.tensor([1, 2, 3, 4])
"""Tokens 1 to 4 of a sequence are coordinates, each of bin TRUE; a row predicts the token after it."""


class MadeUp(nn.Module):
    """Embeddings of the coordinates are +1 and -1 in turn. Expected under a flat distribution they are 0.

    helped: a row is as sure of the true bin as its own embedding is far from +1 and -1. Else it looks at no embedding.
    """

    def __init__(self, *, helped: bool) -> None:
        super().__init__()
        self.helped = helped
        self.embedding = nn.Embedding(K, 1)
        with torch.no_grad():
            self.embedding.weight.copy_(torch.tensor([1.0, -1.0] * (K // 2))[:, None])

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, ids_BT: Tensor) -> Tensor:
        embeds_BTH: Tensor = self.embedding(ids_BT)
        sure_BT = 1.0 - embeds_BTH[..., 0].abs() if self.helped else torch.zeros(ids_BT.shape)
        return 3.0 * sure_BT[..., None] * torch.nn.functional.one_hot(torch.tensor(TRUE), K)


def window(model: MadeUp, forwards: int) -> ForwardsSeen:
    """A step of so many forwards, as `SelfContextRunner` runs and measures it."""
    if forwards == 1:
        return ForwardsSeen(1.0)
    slots = CoordSlots(SLOTS_N, torch.arange(K))
    ids_BT = torch.full((1, 6), TRUE)

    def run(_iteration: int) -> tuple[Tensor, Tensor]:
        logits_NK = model(ids_BT).flatten(0, 1)[slots.rows_N]
        return logits_NK, logits_NK

    seen = run_self_context(model, slots, SelfContext(num_forwards=forwards), run)
    worth = forwards_worth(seen[0], seen[-1], torch.full((4,), TRUE))
    gain, entropy = (
        float(worth[key].sum / worth[key].count) for key in (SOFTCTX_GAIN, SOFTCTX_ENTROPY_CHANGE)
    )
    return ForwardsSeen(float(forwards), gain, entropy)


def train(model: MadeUp, number: int, **changes: Any) -> list[Decision]:
    written = {
        "kind": "softctx_economy",
        "name": "forwards",
        "forced": 5,
        "observed": 5,
        "mode": "act",
        **changes,
    }
    bank = ControllerBank([SoftctxEconomy.model_validate(written)], {"n_softctx_iter": 2.0})
    found = []
    for _ in range(number):
        found += bank.observe({}, window(model, round(bank.knobs()["n_softctx_iter"])))
    return found


def test_the_second_forward_is_given_up_where_it_buys_nothing() -> None:
    found = train(MadeUp(helped=False), 60)
    assert [one.after for one in found] == [2.0] * 10 + [1.0] * (len(found) - 10)
    assert found[0].labels == (TAX_ONLY,)
    assert found[-1].numbers["survival_2"] == pytest.approx(13 / 60)  # 10 before it had a price, 3 audits


def test_it_stays_where_it_helps() -> None:
    """Rows of slots 2 to 4 see the expected embedding 0 in the second forward: from log 16 to -log softmax(3)."""
    model = MadeUp(helped=True)
    found = train(model, 200)
    assert {one.after for one in found} == {2.0}
    assert found[-1].labels[-2:] == (WIN, CONFIDENCE)
    sure = torch.log(torch.exp(torch.tensor(3.0)) + K - 1) - 3.0
    expected = 0.75 * float(
        torch.log(torch.tensor(float(K))) - sure
    )  # the row of the first slot is no slot itself
    assert found[-1].numbers["gain"] == pytest.approx(expected, rel=1e-5)
    assert found[-1].numbers["entropy_change"] < 0
    assert found[-1].numbers["survival_2"] == 1.0
