"""Settings of the stage-2 objective with every atom on, and random batches for it."""

from __future__ import annotations

import torch
from support.stage2 import objective_spec

from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import LossInputs, SupervisedRows, TextRole
from coordexp.losses.modules import ForwardKind

K, V, START = 1000, 1030, 20
COLUMNS = CoordColumns(range(START, START + K))
TOKEN_CE = {
    "desc_ce_weight": 0.7,
    "self_context_struct_ce_weight": 0.3,
    "rollout_fn_desc_weight": 0.4,
    "rollout_matched_prefix_struct_weight": 0.6,
    "rollout_drop_invalid_struct_ce_multiplier": 2.5,
}
BBOX_GEO = {"smoothl1_weight": 1.5, "ciou_weight": 0.8}
COORD_REG = {
    "coord_ce_weight": 0.1,
    "coord_el1_weight": 0.2,
    "coord_ehuber_weight": 0.3,
    "coord_huber_delta": 0.05,
    "coord_entropy_weight": 0.4,
    "coord_gate_weight": 0.5,
    "text_gate_weight": 0.6,
    "soft_ce_weight": 0.7,
    "self_context_soft_ce_weight": 0.05,
    "w1_weight": 0.9,
    "temperature": 1.5,
    "target_sigma": 3.0,
    "target_truncate": 12,
}
SCALES = {"token_ce": 1.1, "bbox_geo": 1.2, "coord_reg": 1.3}
COORD_ATOMS = [
    "bbox_smoothl1",
    "bbox_ciou",
    "coord_token_ce",
    "coord_soft_ce",
    "coord_w1",
    "coord_el1",
    "coord_ehuber",
    "coord_entropy",
    "coord_gate",
    "text_gate",
]
PROVENANCES = {
    ForwardKind.ANCHOR: {"A1_text/struct_ce", "A1_text/desc_ce"},
    ForwardKind.SELF_CONTEXT: {"A2_text/struct_ce", *(f"A2_coord/{atom}" for atom in COORD_ATOMS)},
    ForwardKind.TEACHER_FORCED: {
        "A1_text/struct_ce",
        "A1_text/desc_ce",
        *(f"A2_coord/{atom}" for atom in COORD_ATOMS),
    },
    ForwardKind.ROLLOUT: {
        "B_rollout_text/struct_ce",
        "B_rollout_text/desc_ce",
        *(f"B_coord/{atom}" for atom in COORD_ATOMS),
    },
}


def make_spec(token_ce=None, bbox_geo=None, coord_reg=None, channels=("A", "B"), diagnostics=True, skip=()):
    configs = {
        "token_ce": TOKEN_CE | (token_ce or {}),
        "bbox_geo": BBOX_GEO | (bbox_geo or {}),
        "coord_reg": COORD_REG | (coord_reg or {}),
    }
    entries = [
        {"name": name, "enabled": True, "weight": SCALES[name], "channels": list(channels), "config": config}
        for name, config in configs.items()
        if name not in skip
    ]
    diag = {"name": "coord_diag", "enabled": diagnostics, "weight": 1.0, "channels": ["A", "B"], "config": {}}
    return objective_spec(entries, [diag])


def make_batch(seed=0, num_tokens=50, num_boxes=3, num_vertices=3, rollout=True):
    """Logits of a flattened batch, and its rows at scattered positions: text of all roles, boxes, a polygon."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, V, generator=g) * 3
    order = torch.randperm(num_tokens, generator=g)
    num_slots = 4 * num_boxes + 2 * num_vertices
    slots_at, text_at = order[:num_slots], order[num_slots : num_slots + 13]
    low = torch.randint(0, 400, (num_boxes, 2), generator=g)
    bins_B4 = torch.cat([low, low + torch.randint(1, 500, (num_boxes, 2), generator=g)], 1)
    poly_bins_N = torch.randint(0, K, (2 * num_vertices,), generator=g)
    roles = [TextRole.STRUCT] * 4 + [TextRole.DESC] * 3 + [TextRole.CLOSE, TextRole.EOS] * 2
    roles += [TextRole.MATCHED_STRUCT if rollout else TextRole.STRUCT] * 2
    rows = SupervisedRows.from_slots(
        text_positions_R=text_at,
        text_targets_R=torch.randint(0, START, (13,), generator=g),
        roles_R=torch.tensor(roles),
        dropped_invalid_R=torch.rand(13, generator=g) < 0.5,
        slot_positions_N=slots_at,
        bins_N=torch.cat([bins_B4.flatten(), poly_bins_N]),
        columns=COLUMNS,
        num_boxes=num_boxes,
    )
    return logits, rows


def evaluate(objective, logits, rows, forward, counts=None):
    inputs = LossInputs.from_logits(logits[rows.positions_R], rows, COLUMNS, objective.needs(forward))
    return objective(inputs, forward, counts or objective.counts(rows, forward))
