"""Move training state off the device while an engine in the same process generates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from coordexp.config.schema.rollout import Offload

Park = Callable[[Tensor], Tensor]
"""Gives the tensor that is kept instead of the one on the device."""


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory."""
    return tensor.to("cpu")


@contextmanager
def offloaded(
    settings: Offload, model: nn.Module, optimizer: Optimizer | None, *, park: Park = to_host
) -> Iterator[None]:
    """What `rollout_matching.offload` names is parked meanwhile; parameters stay the objects the optimizer knows."""
    back: list[Callable[[], None]] = []
    if settings.enabled and settings.offload_model:
        back += [_park_data(tensor, park) for tensor in (*model.parameters(), *model.buffers())]
    if settings.enabled and settings.offload_optimizer and optimizer is not None:
        back += [_park_entry(state, key, park) for state in optimizer.state.values() for key in state]
    _free_device_memory(bool(back))
    try:
        yield
    finally:
        for put_back in back:
            put_back()


def _park_data(tensor: Tensor, park: Park) -> Callable[[], None]:
    home = tensor.device
    tensor.data = park(tensor.data)

    def put_back() -> None:
        tensor.data = tensor.data.to(home)

    return put_back


def _park_entry(state: dict[str, object], key: str, park: Park) -> Callable[[], None]:
    """An entry of the optimizer's state of one parameter; step counters are no tensors, or live on the host."""
    value = state[key]
    if not isinstance(value, Tensor):
        return lambda: None
    home = value.device
    state[key] = parked = park(value)

    def put_back() -> None:
        state[key] = parked.to(home)

    return put_back


def _free_device_memory(parked: bool) -> None:
    if parked and torch.cuda.is_available():
        torch.cuda.empty_cache()
