"""Muon and AdamW as one optimizer: bit for bit what the two are alone, also in flat memory and after a resume."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

from coordexp.errors import ConfigError
from coordexp.optim.composed import MuonAdamW
from coordexp.optim.groups import GroupRule, Part, parameter_groups

MUON = {"momentum": 0.9, "nesterov": True, "ns_steps": 5, "adjust_lr_fn": "match_rms_adamw"}
ADAMW = {"betas": (0.8, 0.95), "eps": 1e-9}


class Net(nn.Module):
    """An embedding, two matrices (wide and tall), one that holds three, a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 6)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6, bias=False)
        self.qkv = nn.Linear(6, 18, bias=False)


def composed(net: Net, *, split: bool = False, **muon: object) -> MuonAdamW:
    rules = [GroupRule("up.weight", "", "muon", 2.0, 0.5), GroupRule("down.weight", "", "muon", 3.0)]
    if split:
        rules.append(GroupRule("qkv.*", "", "muon"))
    groups = parameter_groups(
        list(net.named_parameters()), [*rules, GroupRule("*", "")], [Part("", ("",), 0.01)], weight_decay=0.1
    )
    return MuonAdamW(groups, muon=MUON | muon, adamw=ADAMW, pieces={net.qkv.weight: 3} if split else None)


def alone(net: Net) -> list[torch.optim.Optimizer]:
    """The same with torch's optimizers."""
    return [
        torch.optim.Muon(
            [
                {"params": [net.up.weight], "lr": 0.02, "weight_decay": 0.05},
                {"params": [net.down.weight], "lr": 0.03, "weight_decay": 0.1},
            ],
            **MUON,
        ),
        torch.optim.AdamW(
            [
                {"params": [net.embed.weight, net.qkv.weight], "weight_decay": 0.1},
                {"params": [net.up.bias], "weight_decay": 0.0},
            ],
            lr=0.01,
            **ADAMW,
        ),
    ]


def give_gradients(net: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))


def test_updates_are_bit_for_bit_those_of_muon_and_adamw_alone_under_one_schedule():
    one, two = Net(), Net()
    together, apart = composed(one), alone(two)
    schedules = [schedule(optimizer) for optimizer in (together, *apart)]
    for step in range(5):
        give_gradients(one, step)
        give_gradients(two, step)
        for optimizer in (together, *apart):
            optimizer.step()
        for each in schedules:
            each.step()
    assert_equal(one, two)
    assert not torch.equal(one.up.weight, Net().up.weight)


def test_update_of_a_matrix_is_orthogonal_up_to_newton_schulz():
    """Without decay and momentum a step is -lr * 0.2 sqrt(10) * O, with singular values of O near 1."""
    net = Net()
    before = net.down.weight.detach().clone()
    optimizer = composed(net, momentum=0.0, nesterov=False)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    give_gradients(net, 0)
    optimizer.step()
    singular = torch.linalg.svdvals((before - net.down.weight.detach()) / (0.03 * 0.2 * 10**0.5))
    assert ((singular > 0.65) & (singular < 1.25)).all()


@pytest.mark.parametrize("nesterov", [True, False])
def test_split_projection_is_trained_as_its_three_matrices(nesterov: bool):
    net = Net()
    optimizer = composed(net, split=True, nesterov=nesterov)
    thirds = [nn.Parameter(third.clone()) for third in net.qkv.weight.detach().chunk(3)]
    expected = torch.optim.Muon(thirds, lr=0.01, weight_decay=0.1, **MUON | {"nesterov": nesterov})
    for step in range(3):
        give_gradients(net, step)
        for third, grad in zip(thirds, net.qkv.weight.grad.chunk(3), strict=True):
            third.grad = grad.clone()
        optimizer.step()
        expected.step()
    assert torch.equal(net.qkv.weight.detach(), torch.cat([third.detach() for third in thirds]))


@pytest.mark.parametrize("split", [False, True])
def test_resumed_run_goes_on_bit_for_bit(split: bool):
    one = Net()
    optimizer = composed(one, split=split)
    rates = schedule(optimizer)

    def train(net: Net, optimizer: MuonAdamW, rates: torch.optim.lr_scheduler.LambdaLR, steps: range) -> None:
        for step in steps:
            give_gradients(net, step)
            optimizer.step()
            rates.step()

    train(one, optimizer, rates, range(3))
    file = io.BytesIO()
    torch.save([one.state_dict(), optimizer.state_dict(), rates.state_dict()], file)
    train(one, optimizer, rates, range(3, 6))

    file.seek(0)
    weights, state, of_rates = torch.load(file, weights_only=True)
    two = Net()
    two.load_state_dict(weights)
    again = composed(two, split=split)
    rates_again = schedule(again)
    again.load_state_dict(state)
    rates_again.load_state_dict(of_rates)
    train(two, again, rates_again, range(3, 6))
    assert_equal(one, two)


def test_state_of_other_groups_is_refused():
    with pytest.raises(ConfigError, match=r"the checkpoint's optimizer has the groups .*qkv"):
        composed(Net()).load_state_dict(composed(Net(), split=True).state_dict())


def test_parameters_without_a_gradient_stay():
    net = Net()
    optimizer = composed(net, split=True)
    optimizer.step()
    assert_equal(net, Net())


def test_group_added_later_is_adamws():
    net, table = Net(), nn.Parameter(torch.ones(3, 2))
    optimizer = composed(net)
    optimizer.add_param_group({"params": [table], "lr": 0.5, "weight_decay": 0.0})
    expected = nn.Parameter(torch.ones(3, 2))
    adamw = torch.optim.AdamW([expected], lr=0.5, weight_decay=0.0, **ADAMW)
    table.grad = expected.grad = torch.arange(6.0).view(3, 2)
    optimizer.step()
    adamw.step()
    assert torch.equal(table, expected)


def test_prepared_by_accelerate_it_does_the_same():
    from accelerate import Accelerator

    one, two = Net(), Net()
    accelerator = Accelerator(cpu=True)
    net, optimizer = accelerator.prepare(one, composed(one))
    plain = composed(two)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, backward: Callable[[torch.Tensor], object]):
        loss = model.down(model.up(model.embed(torch.tensor([1, 2])))).square().sum() + model.qkv.weight.sum()
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()

    for _ in range(3):
        step(net, optimizer, accelerator.backward)
        step(two, plain, torch.Tensor.backward)
    assert_equal(one, two)
