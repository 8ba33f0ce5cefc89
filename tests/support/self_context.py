"""Self-context through whole logits: the plainest forward there is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from coordexp.models.self_context import CoordSlots, SelfContext, run_self_context


def slot_logits(logits_BTV: Tensor, slots: CoordSlots) -> Tensor:
    """[N, K]: the coordinate logits that predict the slots."""
    return logits_BTV.flatten(0, 1).index_select(0, slots.rows_N).index_select(1, slots.coord_ids_K)


def self_context_logits(
    model: nn.Module, batch: Mapping[str, Any], slots: CoordSlots, settings: SelfContext
) -> list[Tensor]:
    """Logits [B, T, V] of every forward, in order; the first one's are those of `model(**batch)`."""

    def forward(_iteration: int) -> tuple[Tensor, Tensor]:
        logits_BTV = model(**batch, use_cache=False).logits
        return logits_BTV, slot_logits(logits_BTV, slots)

    return run_self_context(model, slots, settings, forward)
