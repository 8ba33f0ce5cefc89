"""Loss of the supervised rows of a forward, through the plain or the fused head (`custom.head`).

    plain   the head is called as a module on the supervised rows; their logits [R, V] are kept for the backward
    fused   the loss and its gradients are taken inside the head's call, a chunk of rows at a time
    auto    fused where the logits would exceed `losses.head.PLAIN_BYTES` in float32 (256 MiB: 440 rows of a
            vocabulary of 152k) and products run in a dtype the fused head takes; otherwise the rows in one piece

All ways give the same loss, gradients and metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from coordexp.errors import ConfigError
from coordexp.losses.columns import CoordColumns
from coordexp.losses.fused import Observer
from coordexp.losses.head import HeadMode, apply_head
from coordexp.losses.head_module import projection_of
from coordexp.losses.inputs import LossInputs, LossNeeds, SupervisedRows
from coordexp.losses.projection import HeadProjection
from coordexp.models.head_call import head_computes
from coordexp.models.supervised_rows import head_on_rows

Terms = TypeVar("Terms")
Objective = Callable[[LossInputs], tuple[Tensor, Terms]]


class RowsHead:
    """Runs a model and an objective on the supervised rows of its hidden states.

    Arguments:
        mode: `custom.head`.
        columns: the coordinate tokens.
    """

    def __init__(self, mode: HeadMode, columns: CoordColumns) -> None:
        self.mode, self.columns = mode, columns

    def __call__(
        self,
        model: nn.Module,
        unwrapped: nn.Module,
        inputs: dict[str, Any],
        rows: SupervisedRows,
        needs: LossNeeds,
        objective: Objective[Terms],
        observe: Observer,
    ) -> tuple[Tensor, list[Terms]]:
        """One forward: the loss, 0-dim, and the terms of each chunk (at least one).

        Arguments:
            model: called with `inputs`; may be wrapped (DDP, DeepSpeed). `unwrapped` is the model inside.
            needs, objective, observe: as for `losses.head.apply_head`. The objective divides by counts that are
                known before the forward.
        """
        exact = _without_autocast(objective, rows.targets_R.device.type)

        def from_logits(logits_RV: Tensor) -> tuple[Tensor, Terms]:
            observe(logits_RV.detach(), rows)
            return exact(LossInputs.from_logits(logits_RV, rows, self.columns, needs))

        if self.mode == "plain":
            with head_on_rows(unwrapped, rows.positions_R):
                outputs = model(**inputs, use_cache=False)
            loss, terms = from_logits(outputs.logits)
            return loss, [terms]

        parts: list[Terms] = []

        def in_head(head: nn.Module, hidden_BTH: Tensor) -> Tensor:
            hidden_RH = hidden_BTH.flatten(0, 1).index_select(0, rows.positions_R)
            projection = self._projection(head, hidden_RH)
            if projection is None:
                loss, terms = from_logits(head(hidden_RH))
                parts.append(terms)
                return loss
            loss, terms_of_chunks = apply_head(
                projection, rows, self.columns, needs, exact, mode=self.mode, observe=observe
            )
            parts.extend(terms_of_chunks)
            return loss

        with head_computes(unwrapped, in_head):
            outputs = model(**inputs, use_cache=False)
        return outputs.logits, parts

    def _projection(self, head: nn.Module, hidden_RH: Tensor) -> HeadProjection | None:
        """The head as tensors; None where `auto` meets a head that is no sum of products (quantised, DoRA)."""
        try:
            return projection_of(head, hidden_RH)
        except ConfigError:
            if self.mode == "fused":
                raise
            return None


def _without_autocast(objective: Objective[Terms], device_type: str) -> Objective[Terms]:
    """The objective in the dtype of its inputs, also inside the forward of a model under autocast."""

    def exact(inputs: LossInputs) -> tuple[Tensor, Terms]:
        with torch.autocast(device_type, enabled=False):
            return objective(inputs)

    return exact
