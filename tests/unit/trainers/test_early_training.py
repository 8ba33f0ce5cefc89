"""Gradients of forwards that ran before the step's denominators were known."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from coordexp.trainers.early_training import EarlyTraining, HeldGradients

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Pack:
    """What early training needs of a forward: whether its numbers are shown. Beside it, inputs."""

    x: Tensor
    counts: bool = True

    @property
    def own_counts(self) -> dict[str, Tensor]:
        rows = float(len(self.x))
        return {"text": torch.tensor(2 * rows), "boxes": torch.tensor(rows), "unused": torch.tensor(0.0)}


class Model(nn.Module):
    """Two atoms that share parameters: one over `text`, one over `boxes`."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.frozen, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.frozen.requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.double()

    def loss(self, pack: Pack, counts: dict[str, Tensor]) -> Tensor:
        out = self.head(self.dropout(self.frozen(self.body(pack.x).tanh())))
        return (out[:, 0] ** 2).sum() / counts["text"] + out[:, 1].abs().sum() / counts["boxes"]


def packs(*sizes: int) -> list[Pack]:
    generator = torch.Generator().manual_seed(1)
    return [Pack(torch.randn(size, 3, generator=generator, dtype=torch.float64)) for size in sizes]


def totals(parts: list[Pack]) -> dict[str, Tensor]:
    return {
        name: sum((part.own_counts[name] for part in parts), torch.tensor(0.0)).double()
        for name in parts[0].own_counts
    }


def gradients(model: Model) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def run_early(
    model: Model, early: list[Pack], late: list[Pack], counts: dict[str, Tensor]
) -> tuple[Tensor, list[bool]]:
    """The step's loss, with `early` trained before `counts` are known; and which passes were shown."""
    shown: list[bool] = []

    def backward(pack: Pack, guessed: dict[str, Tensor]) -> Tensor:
        loss = model.loss(pack, guessed)
        loss.backward()
        shown.append(pack.counts)
        return loss.detach()

    training = EarlyTraining(list(model.parameters()), ("text", "boxes"), CPU)
    for pack in early:
        training.run(pack, pack.own_counts, 0.3, backward)
    assert not gradients(model)  # nothing is divided rightly yet, so nothing is in .grad
    total = training.settle(counts)
    for pack in late:
        loss = model.loss(pack, counts)
        loss.backward()
        total = total + loss.detach()
    assert training.forwards == early
    return total, shown


@pytest.mark.parametrize("num_early", [0, 1, 2, 4])
def test_gradient_and_loss_are_those_of_one_division_at_the_end(num_early):
    parts = packs(5, 1, 7, 2)
    counts = totals(parts)
    plain = Model()
    expected = sum(plain.loss(pack, counts) for pack in parts)
    expected.backward()
    model = Model()
    total, shown = run_early(model, parts[:num_early], parts[num_early:], counts)
    torch.testing.assert_close(total, expected.detach(), rtol=1e-12, atol=0)
    assert gradients(model).keys() == gradients(plain).keys()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-10, atol=1e-14)
    assert shown == [False, True] * num_early  # each forward's numbers are taken once


def test_a_denominator_that_stays_zero_gives_no_gradient():
    class OnlyText(Model):
        def loss(self, pack, counts):
            out = self.head(self.frozen(self.body(pack.x).tanh()))
            return (out[:, 0] ** 2).sum() / counts["text"] + 0.0 * out[:, 1].sum() / counts["boxes"]

    parts = packs(4)
    counts = totals(parts) | {"boxes": torch.tensor(0.0)}
    model = OnlyText()
    total, _ = run_early(model, parts, [], counts)
    plain = OnlyText()
    expected = plain.loss(parts[0], counts | {"boxes": torch.tensor(1.0)})
    expected.backward()
    torch.testing.assert_close(total, expected.detach())
    torch.testing.assert_close(gradients(model)["body.weight"], gradients(plain)["body.weight"])


def test_dropout_draws_once_per_forward():
    """Both denominators see the same units dropped, and the stream moves on as after one pass."""
    (pack,) = packs(6)
    model, plain = Model(dropout=0.5), Model(dropout=0.5)
    torch.manual_seed(3)
    total, _ = run_early(model, [pack], [], pack.own_counts)
    after = torch.rand(1)
    torch.manual_seed(3)
    expected = plain.loss(pack, pack.own_counts)
    assert torch.equal(after, torch.rand(1))
    torch.testing.assert_close(total, expected.detach())


def test_held_sets_leave_usual_gradients_alone():
    weight = nn.Parameter(torch.tensor([2.0, 3.0]))
    weight.grad = torch.tensor([1.0, 1.0])
    held = HeldGradients([weight])
    for _ in range(2):
        with held.collect("a"):
            (5 * weight).sum().backward()
    with held.collect("b"):
        weight.prod().backward()
    assert weight.grad.tolist() == [1.0, 1.0]
    held.release({"a": torch.tensor(0.1), "b": torch.tensor(2.0)})
    assert weight.grad.tolist() == pytest.approx([1 + 1.0 + 6.0, 1 + 1.0 + 4.0])
    held.release({})
    assert weight.grad.tolist() == pytest.approx([8.0, 6.0])
