"""How much is supervised: numbers for metrics, and the denominators of a whole optimizer step.

A step is divided by counts over all its forwards and ranks. They are known before the first forward:

    stage 1   num_text and num_coord of count_supervision(samples), added up
    stage 2   step_counts(rows of all forwards, objective, forward), added up over ranks
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor

from coordexp.codec.token_types import TokenType
from coordexp.losses.inputs import SupervisedRows
from coordexp.losses.modules import ForwardKind
from coordexp.losses.objective import Stage2Objective
from coordexp.targets.roles import NOT_A_ROW, Role, text_roles
from coordexp.targets.sample import EncodedSample


@dataclass(frozen=True)
class SupervisionCounts:
    """Sums over samples; add them with `+`."""

    num_samples: int = 0
    num_tokens: int = 0
    """Prompt, target and `<|im_end|>`."""
    num_prompt: int = 0
    num_prefix: int = 0
    """Target tokens that are rollout prefix."""
    num_appended: int = 0
    """Target tokens after the prefix (all of them for ground truth)."""
    num_appended_desc: int = 0
    """Those among them inside descriptions."""
    num_text: int = 0
    """Tokens with a cross-entropy row."""
    num_coord: int = 0
    """Coordinate slots: of boxes and, beyond 4 * num_boxes, of polygons."""
    num_boxes: int = 0
    num_prefix_coord: int = 0
    """Coordinate slots in the prefix."""
    num_matched: int = 0
    """Matched predictions."""

    def __add__(self, other: SupervisionCounts) -> SupervisionCounts:
        return SupervisionCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def count_supervision(samples: Iterable[EncodedSample]) -> SupervisionCounts:
    """The counts of all samples together."""
    return sum(map(_count_one, samples), SupervisionCounts())


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


def _count_one(sample: EncodedSample) -> SupervisionCounts:
    appended = slice(sample.prompt_length + sample.prefix_length, None)
    slots = np.concatenate([sample.box_positions_B4.ravel(), sample.poly_positions_N])
    return SupervisionCounts(
        num_samples=1,
        num_tokens=sample.num_tokens,
        num_prompt=sample.prompt_length,
        num_prefix=sample.prefix_length,
        num_appended=sample.appended_length,
        num_appended_desc=int((sample.types_T[appended] == TokenType.DESC).sum()),
        num_text=int((text_roles(sample.roles_T, sample.types_T) != NOT_A_ROW).sum()),
        num_coord=len(slots),
        num_boxes=sample.num_boxes,
        num_prefix_coord=int((sample.roles_T[slots] == Role.MATCHED_PREFIX).sum()),
        num_matched=sample.num_matched,
    )


def _no_rows() -> SupervisedRows:
    nothing = torch.zeros(0, dtype=torch.int64)
    return SupervisedRows(
        nothing, nothing, 0, nothing, group=4, roles_R=nothing, dropped_invalid_R=nothing.bool()
    )
