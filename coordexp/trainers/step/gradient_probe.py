"""`telemetry.gradient_probe`: lengths and cosines of the gradients of the loss's atoms, every so many steps.

Each forward of a probed step adds inner products (`head.atom_gradients`); after the step they are added up over ranks,
and the main process logs what follows from them. All ranks have a probe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from coordexp.head.atom_gradients import HeadProbe, add_gram
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import LossInputs, LossNeeds, SupervisedRows
from coordexp.metrics.keys_run import (
    GRADIENT_ATOMS,
    GRADIENT_TOTAL,
    gradient_cos,
    gradient_cos_total,
    gradient_norm,
)
from coordexp.trainers.step.ranks import sum_over_ranks

_PLACES = {atom: place for atoms in GRADIENT_ATOMS.values() for place, atom in enumerate(atoms)}


@dataclass
class _Step:
    """What the forwards of a probed step have added so far. names: of all its atoms, in the catalogue's order."""

    names: tuple[str, ...]
    gram_AA: Tensor


class GradientProbe(TrainerCallback):
    """Watches the steps whose number (from 0) `every_steps` divides.

    log: takes the numbers of a step by key; None on ranks that log nothing.
    """

    def __init__(
        self,
        every_steps: int | None,
        columns: CoordColumns,
        device: torch.device,
        log: Callable[[Mapping[str, float]], None] | None,
    ) -> None:
        self._every, self._columns, self._device, self._log = every_steps, columns, device, log
        self._step: _Step | None = None

    @classmethod
    def of_run(cls, trainer: Any) -> GradientProbe:
        """The probe of one of our trainers, off in a dry run."""
        sections = trainer.settings.sections
        every_steps = None if sections.custom.dry_run else sections.telemetry.gradient_probe.every_steps
        log = trainer.metrics.add_all if trainer.is_world_process_zero() else None
        return cls(every_steps, trainer.columns, trainer.args.device, log)

    def is_due(self, step: int) -> bool:
        """Whether an optimizer step is probed."""
        return self._every is not None and step % self._every == 0

    def watch(
        self,
        step: int,
        names: Sequence[str],
        rows: SupervisedRows,
        needs: LossNeeds,
        losses: Callable[[LossInputs], Mapping[str, Tensor]],
        *,
        counts: bool = True,
    ) -> HeadProbe | None:
        """What the head of a forward is to be watched with; None where the step is not probed.

        names: of all atoms of the step, equal on all ranks and in all forwards.  losses: what some of them add to the
        step's loss, after its denominators, by name.  counts: False for a forward that only keeps ranks in step.
        """
        if not self.is_due(step):
            return None
        if self._step is None:
            ordered = tuple(sorted(names, key=_PLACES.__getitem__))
            size = len(ordered)
            self._step = _Step(ordered, torch.zeros(size, size, dtype=torch.float64, device=self._device))
        if not counts:
            return None
        known = self._step

        def in_order(inputs: LossInputs) -> list[Tensor]:
            found = losses(inputs)
            return [found[name] if name in found else inputs.text_ce_R.new_zeros(()) for name in known.names]

        return partial(
            add_gram, known.gram_AA, rows=rows, columns=self._columns, needs=needs, losses=in_order
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, self._step = self._step, None
        if step is None:
            return
        gram_AA = sum_over_ranks(step.gram_AA)
        if self._log is not None:
            self._log(gradient_numbers(step.names, gram_AA.tolist()))


def gradient_numbers(names: Sequence[str], gram: Sequence[Sequence[float]]) -> dict[str, float]:
    """Lengths and cosines by key. gram: inner product of every two atoms. Without a length there is no cosine."""
    with_total = [sum(row) for row in gram]
    norms = [math.sqrt(max(gram[place][place], 0.0)) for place in range(len(names))]
    total = math.sqrt(max(sum(with_total), 0.0))
    numbers = {gradient_norm(GRADIENT_TOTAL): total}
    for place, name in enumerate(names):
        numbers[gradient_norm(name)] = norms[place]
        if norms[place] > 0 and total > 0:
            numbers[gradient_cos_total(name)] = with_total[place] / (norms[place] * total)
        for other in range(place):
            if norms[place] > 0 and norms[other] > 0:
                cosine = gram[place][other] / (norms[place] * norms[other])
                numbers[gradient_cos(names[other], name)] = cosine
    return numbers
