"""How much is supervised: numbers for metrics, and the denominators of a whole optimizer step.

A step is divided by counts over all its forwards and ranks, which are known before the first forward: the
`step_counts` of the rows of all forwards, added up over ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coordexp.losses.inputs import SupervisedRows
from coordexp.losses.modules import ForwardKind
from coordexp.losses.objective import Stage2Objective
from coordexp.targets.roles import TokenRole
from coordexp.targets.sample import EncodedSample


@dataclass(frozen=True)
class SupervisionCounts:
    """Sums over samples."""

    num_matched: int
    """Matched predictions."""
    num_prefix_coord: int
    """Coordinate slots in the prefix, of boxes and polygons."""


def count_supervision(samples: Iterable[EncodedSample]) -> SupervisionCounts:
    """The counts of all samples together."""
    samples = list(samples)
    return SupervisionCounts(
        sum(sample.num_matched for sample in samples), sum(map(_num_prefix_coord, samples))
    )


def step_counts(
    forwards: Iterable[SupervisedRows], objective: Stage2Objective, forward: ForwardKind
) -> dict[str, Tensor]:
    """This rank's share of a step's denominators: `objective.counts` over all its forwards.

    The same names on every rank, also on one that has no forward (then all 0).  0-dim float tensors.
    """
    totals = objective.counts(_no_rows(), forward)
    for rows in forwards:
        for name, count in objective.counts(rows, forward).items():
            totals[name] = totals[name] + count
    return totals


def _num_prefix_coord(sample: EncodedSample) -> int:
    slots = np.concatenate([sample.box_positions_B4.ravel(), sample.poly_positions_N])
    return int((sample.roles_T[slots] == TokenRole.MATCHED_PREFIX).sum())


def _no_rows() -> SupervisedRows:
    nothing = torch.zeros(0, dtype=torch.int64)
    return SupervisedRows(nothing, nothing, 0, nothing, roles_R=nothing, dropped_invalid_R=nothing.bool())
