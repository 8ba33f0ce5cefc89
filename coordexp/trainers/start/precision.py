"""Are small updates of the weights kept? Looked at where the optimizer is made, with the parameters it really has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_MASTER_OFF = ("fp16_master_weights_and_grads", "bf16_master_weights_and_grads")
_LOOKED_AT = 1_000_000  # weights, of the largest group's largest tensor


def lost_updates(model: nn.Module, optimizer: Optimizer, deepspeed: Mapping[str, Any] | None) -> str | None:
    """A sentence where the optimizer updates weights of 16 bits that nobody keeps a float32 copy of; None otherwise.

    deepspeed: its configuration, when its engine runs.
    """
    if deepspeed is not None and keeps_master_copy(deepspeed):
        return None
    trained = [(p, group["lr"]) for group in optimizer.param_groups for p in group["params"]]
    low = [(p, rate) for p, rate in trained if p.dtype in (torch.bfloat16, torch.float16)]
    if not low:
        return None
    largest, rate = max(low, key=lambda entry: entry[0].numel())
    name = next((name for name, p in model.named_parameters() if p is largest), "a parameter")
    number, of = (sum(p.numel() for p, _ in entries) for entries in (low, trained))
    dtypes = " and ".join(sorted({str(p.dtype).removeprefix("torch.") for p, _ in low}))
    return (
        f"{number:,} of {of:,} trained weights are {dtypes}, and nothing keeps a float32 copy of them: an update that "
        f"is smaller than half the distance of two numbers is lost. Of {name}, {moving_share(largest, rate):.0%} would "
        f"move in a step of {rate:g}, the learning rate here. Use torch_dtype: float32 with bf16: true, or deepspeed: "
        "zero2, which keeps a copy."
    )


def keeps_master_copy(deepspeed: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed's engine updates float32 copies: under ZeRO, and in its modes of 16 bits."""
    modes = [deepspeed.get(mode) or {} for mode in ("bf16", "fp16")]
    if any(mode.get(switch) for mode in modes for switch in _MASTER_OFF):
        return False
    stage = (deepspeed.get("zero_optimization") or {}).get("stage", 0)
    return bool(stage) or any(mode.get("enabled") is True for mode in modes)


@torch.no_grad()
def moving_share(weights: Tensor, rate: float) -> float:
    """The share of `weights` that are other numbers after an update of size `rate`, as AdamW's first is; in 0..1."""
    some = weights.detach().flatten()[:_LOOKED_AT]
    if some.numel() == 0:
        return 0.0
    return float(((some.float() - rate).to(some.dtype) != some).float().mean())
