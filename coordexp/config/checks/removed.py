"""Keys of earlier releases of this method that must fail with what replaced them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from coordexp.config.checks.problems import KeyPath, Problem, dotted
from coordexp.config.checks.yaml_tree import Tree

_PIPELINE = "it is set per module in the pipeline"
_OVERLAP = "a step waits for all its rollouts; remove it, and start more rollout servers to get them sooner"
_CHANNEL_B = "channel B has one contract: rollout prefix, missed objects appended, one forward"

REMOVED: tuple[tuple[str, str], ...] = (
    (r"stage2_ab\.schedule\.pattern", "use stage2_ab.schedule.b_ratio (share of channel-B steps)"),
    (r"rollout_matching\.rollout_buffer", "rollouts are generated for each optimizer step; remove it"),
    (r"rollout_matching\.temperature", "use rollout_matching.decoding.temperature"),
    (r"rollout_matching\.top_p", "use rollout_matching.decoding.top_p"),
    (r"rollout_matching\.top_k", "use rollout_matching.decoding.top_k"),
    (r"custom\.extra\.rollout_matching(\..*)?", "use the top-level section rollout_matching"),
    (r"custom\.extra", "write its keys under their own sections (rollout_matching, stage2_ab, custom)"),
    (
        r"custom\.coord_expectation_metrics",
        "expected-bin monitors are always logged (coord_diag/expected_bin_*)",
    ),
    (r"stage2_ab\.desc_ce_weight", f"{_PIPELINE}: token_ce.config.desc_ce_weight"),
    (
        r"stage2_ab\.fmt_struct_ce_weight",
        f"{_PIPELINE}: token_ce.config.self_context_struct_ce_weight",
    ),
    (r"stage2_ab\.bbox_smoothl1_weight", f"{_PIPELINE}: bbox_geo.config.smoothl1_weight"),
    (r"stage2_ab\.bbox_ciou_weight", f"{_PIPELINE}: bbox_geo.config.ciou_weight"),
    (r"stage2_ab\.(coord_\w+_weight|coord_huber_delta)", _PIPELINE + r": coord_reg.config.\1"),
    (r"stage2_ab\.(text_gate_weight|soft_ce_weight|w1_weight)", _PIPELINE + r": coord_reg.config.\1"),
    (r"stage2_ab\.channel_b\.reordered_gt_sft", _CHANNEL_B),
    (
        r"stage2_ab\.channel_b\.desc_ce_weight_matched",
        "descriptions of matched objects are never trained; remove it",
    ),
    (r"stage2_ab\.channel_b\.semantic_desc_gate", "use rollout_matching.desc_monitor (metrics only)"),
    (r"stage2_ab\.channel_b\.mode", _CHANNEL_B),
    (r"stage2_ab\.channel_b\.async", "rollouts are made inside the optimizer step; remove it"),
    (
        r"stage2_ab\.channel_b\.rollouts_per_step",
        "use training.effective_batch_size (raw samples of an optimizer step)",
    ),
    (
        r"stage2_ab\.channel_b\.enable_pipeline",
        "rollouts are made inside the optimizer step; remove it",
    ),
    (r"rollout_matching\.overlap(\..*)?", _OVERLAP),
    (r"stage2_ab\.channel_b\.rollout_decode_batch_size", "use rollout_matching.decode_batch_size"),
    (
        r"stage2_ab\.channel_b\.stop_neutral",
        "the closing brace and <|im_end|> are always supervised; remove it",
    ),
)
"""Pattern of a whole dotted path -> what to do instead."""

REMOVED_VARIANTS = {
    "stage2_ab_training": "stage2_two_channel",
    "rollout_matching_sft": "stage2_rollout_aligned",
}
"""Trainer variants of earlier releases -> their names now."""


def find_removed(tree: Tree) -> list[tuple[KeyPath, Problem]]:
    """Every removed key in the sections; where a removed mapping holds removed keys, each of those."""
    found = []
    for path, value in _walk(tree.data, ()):
        hint = replacement(dotted(path))
        if hint is not None and not any(replacement(dotted(inner)) for inner, _ in _walk(value, path)):
            found.append((path, Problem(dotted(path), f"removed; {hint}.", place=tree.place(path))))
    return found


def replacement(path: str) -> str | None:
    """What replaced the key at a dotted path, or None if it was never removed."""
    for pattern, text in REMOVED:
        match = re.fullmatch(pattern, path)
        if match:
            return match.expand(text)
    return None


def removed_variant(name: object) -> str | None:
    """What to do about a trainer variant that was renamed, or None."""
    current = REMOVED_VARIANTS.get(name) if isinstance(name, str) else None
    return None if current is None else f"removed; use {current}"


def _walk(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield (*path, key), item
            yield from _walk(item, (*path, key))
