"""ms-swift's trainers of `swift rlhf` that generate, with a hook of ours.

ms-swift builds trainers from an import path and hands them nothing of ours, so the hook waits here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from swift.rlhf_trainers import GKDTrainer, GRPOTrainer
from swift.trainers import TrainerFactory

OnBuilt = Callable[[Any], None]
"""Receives the trainer before it trains."""

_on_built: list[OnBuilt] = []


class CoordGRPOTrainer(GRPOTrainer):
    """GRPO, with our hook."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for hook in _on_built:
            hook(self)


class CoordGKDTrainer(GKDTrainer):
    """Distillation on the student's own answers, with our hook."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for hook in _on_built:
            hook(self)


def use_rlhf_trainers(on_built: OnBuilt) -> None:
    """Let `swift rlhf` construct these trainers in this process, and hand each to `on_built`."""
    _on_built[:] = [on_built]
    for name, trainer in {"grpo": CoordGRPOTrainer, "gkd": CoordGKDTrainer}.items():
        TrainerFactory.TRAINER_MAPPING[name] = f"{trainer.__module__}.{trainer.__qualname__}"
