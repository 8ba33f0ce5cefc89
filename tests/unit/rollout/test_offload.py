"""Parked state comes back: same values, same parameter objects, also after an error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coordexp.config.schema.rollout import Offload
from coordexp.rollout.backends.offload import offloaded


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def as_half(tensor: torch.Tensor) -> torch.Tensor:
    """Something to recognise a parked tensor by, on a machine with one device."""
    return tensor.half() if tensor.is_floating_point() else tensor


@pytest.mark.parametrize(
    ("settings", "model_parked", "optimizer_parked"),
    [
        (Offload(enabled=False, offload_model=True, offload_optimizer=True), False, False),
        (Offload(enabled=True, offload_model=True), True, False),
        (Offload(enabled=True, offload_optimizer=True), False, True),
        (Offload(enabled=True, offload_model=True, offload_optimizer=True), True, True),
    ],
)
def test_what_the_settings_name_is_parked_meanwhile(settings, model_parked: bool, optimizer_parked: bool):
    model, optimizer = trained()
    weight = model[0].weight
    with offloaded(settings, model, optimizer, park=as_half):
        assert (weight.dtype == torch.float16) == model_parked
        assert (model[1].running_mean.dtype == torch.float16) == model_parked
        assert (optimizer.state[weight]["exp_avg"].dtype == torch.float16) == optimizer_parked


def test_values_and_objects_come_back_even_after_an_error():
    model, optimizer = trained()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    moments = [optimizer.state[p]["exp_avg"].clone() for p in parameters]
    everything = Offload(enabled=True, offload_model=True, offload_optimizer=True)
    with pytest.raises(RuntimeError, match="engine"), offloaded(everything, model, optimizer):
        raise RuntimeError("engine died")
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    for parameter, moment in zip(parameters, moments, strict=True):
        assert torch.equal(optimizer.state[parameter]["exp_avg"], moment)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
