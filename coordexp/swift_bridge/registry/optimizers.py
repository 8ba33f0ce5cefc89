"""Optimizers of ours under the names that ms-swift's `optimizer` looks up; parts of a model, as ms-swift knows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import PeftModel
from swift.optimizers import OptimizerCallback, optimizers_map
from torch import nn
from torch.optim import Optimizer

CreateOptimizer = Callable[[Any, nn.Module], Optimizer]
"""(ms-swift's trainer, its model) -> optimizer."""


def register_optimizer(name: str, create: CreateOptimizer) -> None:
    """Let `--optimizer NAME` build what `create` returns; the scheduler is the HF Trainer's."""

    class _Callback(OptimizerCallback):
        def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
            return create(self.trainer, self.trainer.model if model is None else model)

    optimizers_map[name] = _Callback


def vision_prefixes(model: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """How names of parameters of the vision tower begin, and of the aligner, which lies in it in some models.

    model: as ms-swift loaded it, under LoRA or not.
    """
    arch = model.model_meta.model_arch
    base = "base_model.model." if isinstance(model, PeftModel) else ""
    tower, aligner = arch.vision_tower or (), arch.aligner or ()
    return tuple(base + prefix for prefix in tower), tuple(base + prefix for prefix in aligner)
