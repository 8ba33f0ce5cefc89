"""Muon and AdamW as one optimizer, for everything that expects one: schedulers, accelerate, DeepSpeed, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from coordexp.errors import ConfigError
from coordexp.optim.groups import ParameterGroup
from coordexp.optim.matrices import FlatMatrices, muon_step, stacked


def param_groups_of(groups: Sequence[ParameterGroup]) -> list[dict[str, Any]]:
    """Groups as torch's optimizers take them."""
    return [
        {
            "params": list(group.parameters),
            "lr": group.learning_rate,
            "weight_decay": group.weight_decay,
            "name": group.name,
            "algorithm": group.algorithm,
        }
        for group in groups
    ]


class MuonAdamW(Optimizer):
    """Steps each of its groups with `torch.optim.Muon` or `torch.optim.AdamW`, as its `algorithm` says.

    Groups and state are one list and one mapping, which both work on; a group added without `algorithm` is AdamW's.

    Args:
        groups: of `coordexp.optim.groups.parameter_groups`.
        muon: options of `torch.optim.Muon` beside learning rate and decay.
        adamw: options of `torch.optim.AdamW` beside them.
        pieces: matrices of Muon that it takes as several, one above the other -> how many.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        *,
        muon: Mapping[str, Any],
        adamw: Mapping[str, Any],
        pieces: Mapping[nn.Parameter, int] | None = None,
    ) -> None:
        self._parts: dict[str, Optimizer] = {
            "adamw": AdamW([{"params": []}], **adamw),
            "muon": Muon([{"params": []}], **muon),
        }
        self._layouts: dict[torch.Tensor, FlatMatrices] = {
            parameter: stacked(parameter, count) for parameter, count in (pieces or {}).items()
        }
        super().__init__(param_groups_of(groups), {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options it leaves out are those of its algorithm."""
        algorithm = param_group.setdefault("algorithm", "adamw")
        for key, value in self._parts[algorithm].defaults.items():
            param_group.setdefault(key, value)
        super().add_param_group(param_group)

    def use_layouts(self, layouts: Mapping[torch.Tensor, FlatMatrices]) -> None:
        """How the matrices lie in flat parameters that took the place of those of Muon's groups."""
        self._layouts = dict(layouts)

    @property
    def pieces(self) -> dict[torch.Tensor, int]:
        """Parameters that hold several matrices -> how many."""
        return {parameter: len(layout.matrices) for parameter, layout in self._layouts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's.

        Raises:
            ConfigError: the state is of other groups.
        """
        ours, theirs = (
            [group.get("name") for group in groups]
            for groups in (self.param_groups, state_dict["param_groups"])
        )
        if ours != theirs:
            raise ConfigError(
                f"the checkpoint's optimizer has the groups {theirs}, this run's has {ours}; resume with the settings "
                "of custom.optimizer that it was trained with, or start from its weights alone "
                "(resume_only_model: true)."
            )
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every group that `param_groups` holds now (DeepSpeed shows them one at a time)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        flat: list[tuple[nn.Parameter, dict[str, Any]]] = []
        whole: dict[str, list[dict[str, Any]]] = {"adamw": [], "muon": []}
        for group in self.param_groups:
            if group["algorithm"] == "adamw":
                whole["adamw"].append(group)
                continue
            flat += [(p, group) for p in group["params"] if p in self._layouts]
            rest = [p for p in group["params"] if p not in self._layouts]
            whole["muon"].append(group if len(rest) == len(group["params"]) else {**group, "params": rest})
        for algorithm, part in self._parts.items():
            part.param_groups, part.state = whole[algorithm], self.state
            part.step()
        for parameter, group in flat:
            muon_step(parameter, self.state[parameter], group, self._layouts[parameter])
        return loss
