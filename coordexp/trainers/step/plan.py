"""One optimizer step as a value: decided before its first forward, the same shape for every trainer variant.

The HF Trainer asks for all micro-batches of a step at once and then runs them one by one. The plan answers with as many
entries as it was asked for; an entry holds any number of forwards. All ranks run equally many forwards (under ZeRO-3
every forward is collective): a rank with fewer repeats its last one as a filler, whose loss is multiplied by 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from coordexp.control.controllers.bank import Knobs
from coordexp.control.schedule import Channel
from coordexp.data.batch_meta import BatchMeta
from coordexp.errors import ContractError
from coordexp.losses.modules import ForwardKind
from coordexp.trainers.rollouts.answers import RolledOut
from coordexp.trainers.rollouts.metrics import MetricEntries


@dataclass(frozen=True, eq=False)
class PlannedForward:
    """One forward over whole samples, on the host until it runs."""

    inputs: Mapping[str, Any]
    """Arguments of the model."""
    meta: BatchMeta
    slots_N: Tensor | None = None
    """int64 [N]: coordinate tokens of the supervised objects in the flattened batch, for self-context."""
    is_filler: bool = False
    """It only keeps ranks in step: its loss counts 0 and its numbers are not logged."""

    def on(self, device: torch.device, inputs: Mapping[str, Any]) -> PlannedForward:
        """On `device`; `inputs` are its inputs there, in the dtype that the model takes."""
        slots_N = None if self.slots_N is None else self.slots_N.to(device, non_blocking=True)
        return replace(self, inputs=inputs, meta=self.meta.on(device), slots_N=slots_N)


@dataclass(frozen=True)
class StepLoad:
    """How much a rank trains on in a step; fillers are not counted."""

    num_supervised: int = 0
    """Tokens with a loss."""
    num_images: int = 0
    num_tokens: int = 0
    """Of the samples, padding not counted."""
    num_places: int = 0
    """Tokens there is room for: of padded batches, or of packs."""
    is_packed: bool = False


@dataclass(frozen=True, eq=False)
class StepPlan:
    """Everything a rank needs to run one optimizer step."""

    step: int
    """Optimizer steps before this one."""
    kinds: tuple[ForwardKind, ...]
    """What each planned forward is run for, in order."""
    forwards: tuple[PlannedForward, ...]
    """At least one; equally many on all ranks."""
    totals: Mapping[str, Tensor]
    """Denominators of the loss atoms by name, over the whole step and all ranks; on the device."""
    channel: Channel | None = None
    """None in stage 1."""
    rolled_out: RolledOut | None = None
    """The model's answers of this rank that the step teaches on."""
    facts: MetricEntries = field(default_factory=dict)
    """What the plan itself says of the step, for the log."""
    load: StepLoad = StepLoad()
    """How much this rank trains on."""
    knobs: Knobs = field(default_factory=dict)
    """What controllers have in force for the step."""

    @property
    def counted(self) -> tuple[PlannedForward, ...]:
        """The forwards that are no filler."""
        return tuple(forward for forward in self.forwards if not forward.is_filler)

    def entries(self, number: int) -> list[list[PlannedForward]]:
        """The forwards in order over `number` entries; only the first entries can be empty, never the last."""
        if number < 1 or not self.forwards:
            raise ContractError(
                f"{len(self.forwards)} forwards over {number} entries; expected at least one of each."
            )
        cuts = [index * len(self.forwards) // number for index in range(number + 1)]
        return [list(self.forwards[start:stop]) for start, stop in pairwise(cuts)]
