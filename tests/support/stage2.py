"""Settings of short stage-2 runs with every module on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from coordexp.config import Pipeline
from coordexp.losses.modules import ObjectiveSpec

TOKEN_CE = {
    "desc_ce_weight": 1.0, "self_context_struct_ce_weight": 0.1, "rollout_fn_desc_weight": 0.9,
    "rollout_matched_prefix_struct_weight": 0.8, "rollout_drop_invalid_struct_ce_multiplier": 1.5,
}  # fmt: skip
BBOX_GEO = {"smoothl1_weight": 2.0, "ciou_weight": 0.5}
COORD_REG = {
    "coord_ce_weight": 0.2, "coord_el1_weight": 0.3, "coord_ehuber_weight": 0.4, "coord_huber_delta": 0.05,
    "coord_entropy_weight": 0.01, "coord_gate_weight": 0.2, "text_gate_weight": 0.1, "soft_ce_weight": 0.2,
    "self_context_soft_ce_weight": 0.05, "w1_weight": 1.0, "temperature": 1.0, "target_sigma": 4.0,
    "target_truncate": None,
}  # fmt: skip


def module(name: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "enabled": True, "weight": 1.0, "channels": ["A", "B"], "config": dict(config)}


PIPELINE = {
    "objective": [module("token_ce", TOKEN_CE), module("bbox_geo", BBOX_GEO), module("coord_reg", COORD_REG)],
    "diagnostics": [module("coord_diag", {})],
}


def objective_spec(
    objective: Sequence[dict[str, Any]], diagnostics: Sequence[dict[str, Any]] = ()
) -> ObjectiveSpec:
    """Module lists as a run file writes them, checked and read as in a run."""
    lists = {"objective": list(objective), "diagnostics": list(diagnostics)}
    return ObjectiveSpec.from_pipeline(Pipeline.model_validate(lists))


def rollout_aligned(**rollout_matching: Any) -> dict[str, Any]:
    """Sections of stage2_rollout_aligned: greedy HF rollouts of 8 samples, packs of 320 tokens."""
    return {
        "rollout_matching": {
            "backend": "hf", "decode_batch_size": 4, "max_new_tokens": 100, "packing_length": 320,
            "eval_detection": {"enabled": True}, "pipeline": copy.deepcopy(PIPELINE), **rollout_matching,
        },
    }  # fmt: skip


def two_channel(
    b_ratio: float, rollout_matching: dict[str, Any] | None = None, **stage2_ab: Any
) -> dict[str, Any]:
    """Sections of stage2_two_channel with the same objective."""
    sections = rollout_aligned(**(rollout_matching or {}))
    pipeline = sections["rollout_matching"].pop("pipeline")
    return {**sections, "stage2_ab": {"schedule": {"b_ratio": b_ratio}, "pipeline": pipeline, **stage2_ab}}
