"""`custom.deterministic`: whether two runs of one configuration are equal to the bit."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

logger = logging.getLogger(__name__)

_DROPOUTS = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip

Wanted = bool | Literal["auto"]


def settle(
    wanted: Wanted,
    model: nn.Module,
    *,
    device: torch.device,
    noise: float | None = None,
    announces: bool = True,
) -> bool:
    """Decide it for a run and switch torch over; whether the run is deterministic.

    Called before the first forward.  noise: `neftune_noise_alpha`.  announces: whether this rank says so.
    """
    say = logger.log if announces else _silent
    random_parts = list(dropouts(model))
    if noise:
        random_parts.append(f"neftune_noise_alpha: {noise:g}")
    is_on = not random_parts if wanted == "auto" else bool(wanted)
    if not is_on:
        reason = f" ({random_parts[0]} draws at random)" if wanted == "auto" else ""
        say(logging.INFO, "custom.deterministic: %s is off in this run%s.", _written(wanted), reason)
        return False
    # Under auto an operation of an accelerator that has no deterministic form is warned of, not refused.
    use_deterministic(warn_only=wanted == "auto" and device.type != "cpu")
    cost = (
        "It costs no time on a CPU."
        if device.type == "cpu"
        else "It costs time: deterministic kernels (attention backward, embeddings, scatter) are slower, and no "
        "convolution is tuned. custom.deterministic: false gives that up."
    )
    level = logging.INFO if device.type == "cpu" else logging.WARNING
    say(level, "custom.deterministic: %s is on in this run. %s", _written(wanted), cost)
    return True


def use_deterministic(*, warn_only: bool = False) -> None:
    """Only operations of torch that give the same bits every time.

    warn_only: what has no deterministic form is warned of, not refused.

    Unlike `transformers.enable_full_determinism` it leaves CUDA_LAUNCH_BLOCKING alone, which makes every kernel wait
    and would slow down rollout engines that inherit it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def dropouts(model: nn.Module) -> Iterator[str]:
    """Every dropout of a model that is not zero, as `where: probability`."""
    for name, module in model.named_modules():
        if isinstance(module, _DROPOUTS) and module.p > 0:
            yield f"{name}: {module.p:g}"
    config = getattr(model, "config", None)
    if config is not None:
        yield from _configured(config.to_dict(), "config")


def _configured(settings: Mapping[Any, Any], path: str) -> Iterator[str]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _configured(value, f"{path}.{name}")
        elif "dropout" in str(name) and isinstance(value, int | float) and value > 0:
            yield f"{path}.{name}: {value:g}"


def _silent(_level: int, _message: str, *_arguments: object) -> None:
    """Another rank says it."""


def _written(wanted: Wanted) -> str:
    return wanted if isinstance(wanted, str) else str(wanted).lower()
