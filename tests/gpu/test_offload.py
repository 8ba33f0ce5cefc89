"""`rollout_matching.offload`: memory is free meanwhile, and training goes on as if nothing had been moved. 5 s."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from support.gpu import Say
from torch import nn

from coordexp.config.schema.rollout import Offload
from coordexp.rollout.backends.offload import offloaded

pytestmark = pytest.mark.gpu

WIDTH = {"cuda": 4096, "cpu": 64}
EVERYTHING = Offload(enabled=True, offload_model=True, offload_optimizer=True)


class Training(NamedTuple):
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, seed: int) -> float:
        device = next(self.model.parameters()).device
        generator = torch.Generator().manual_seed(seed)
        width = self.model[0].in_features
        loss = self.model(torch.randn(8, width, generator=generator).to(device)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def training(device: torch.device) -> Training:
    width = WIDTH[device.type]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)).to(device)
    return Training(model, torch.optim.AdamW(model.parameters(), lr=1e-3))


def test_steps_around_an_offload_are_those_without_one(device: torch.device, say: Say):
    stayed, moved = training(device), training(device)
    losses = [(stayed.step(0), moved.step(0))]
    parameters = list(moved.model.parameters())
    with offloaded(EVERYTHING, moved.model, moved.optimizer):
        away = {p.device.type for p in parameters}
        away |= {s["exp_avg"].device.type for s in moved.optimizer.state.values()}
    assert away == {"cpu"}
    assert {p.device for p in parameters} == {device}
    losses += [(stayed.step(seed), moved.step(seed)) for seed in (1, 2)]
    different = sum(not torch.equal(a, b) for a, b in zip(stayed.model.parameters(), parameters, strict=True))
    say(f"losses {', '.join(f'{b:.6f}' for _, b in losses)}: equal to the bit; {different} tensors differ")
    assert all(a == b for a, b in losses)
    assert losses[2] != losses[0]
    assert different == 0


def test_device_memory_is_freed_meanwhile(cuda: torch.device, say: Say):
    run = training(cuda)
    run.step(0)
    run.optimizer.zero_grad()
    held = sum(3 * p.numel() * p.element_size() for p in run.model.parameters())
    free = torch.cuda.mem_get_info(cuda)[0]
    before = torch.cuda.memory_allocated(cuda)
    with offloaded(EVERYTHING, run.model, run.optimizer):
        freed = before - torch.cuda.memory_allocated(cuda)
        given_back = torch.cuda.mem_get_info(cuda)[0] - free
    after = torch.cuda.memory_allocated(cuda)
    say(
        f"weights and AdamW's moments take {held / 2**20:.0f} MiB: {freed / 2**20:.0f} MiB freed, "
        f"{given_back / 2**20:.0f} MiB of it given back to the device"
    )
    assert freed >= 0.99 * held
    assert given_back >= 0.9 * held
    assert after == pytest.approx(before, rel=0.01)
