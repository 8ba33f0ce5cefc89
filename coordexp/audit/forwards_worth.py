"""What the forwards of a channel-A step brought, a second time, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from coordexp.audit.rows64 import Rows, Sums
from coordexp.losses.modules import ForwardKind
from coordexp.metrics import keys_control as keys


def num_forwards(plan: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """Forwards of a channel-A step: those that a controller had in force, or the configured ones."""
    configured = config["stage2_ab"]["n_softctx_iter"]
    return round(float(plan.get("knobs", {}).get("n_softctx_iter", configured)))


def add_forwards(
    sums: Sums,
    forward: Mapping[str, Any],
    plan: Mapping[str, Any],
    config: Mapping[str, Any],
    logits_of: Mapping[ForwardKind, Tensor],
    ids_K: Tensor,
) -> None:
    """Adds a planned forward of a channel-A step. logits_of: [B * T, V] of the first and the last."""
    if plan["channel"] != "A":
        return
    sums.add(keys.SOFTCTX_FORWARDS, num_forwards(plan, config))
    if len(logits_of) < 2:
        return
    rows = forward["rows"]
    first, last = (
        Rows.of(rows, logits_of[kind].detach(), ids_K).terms(1.0, 1.0, None)
        for kind in (ForwardKind.ANCHOR, ForwardKind.SELF_CONTEXT)
    )
    count = rows["bins_N"].numel()
    sums.add(keys.SOFTCTX_GAIN, (first["ce"] - last["ce"]).sum(), count)
    sums.add(keys.SOFTCTX_ENTROPY_CHANGE, (last["entropy"] - first["entropy"]).sum(), count)
