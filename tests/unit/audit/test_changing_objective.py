"""The audit's second calculation of an objective that changes over the run agrees with the one that trains."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from support.objective import COLUMNS, START, K, evaluate, make_batch, make_spec

from coordexp.audit.rows64 import Rows, Sums
from coordexp.audit.stage1_equations import Stage1Equations
from coordexp.audit.stage2_equations import Stage2Equations
from coordexp.losses.inputs import LossInputs
from coordexp.losses.modules import ForwardKind
from coordexp.losses.objective import Stage2Objective
from coordexp.losses.stage1 import Stage1Weights, combine, stage1_terms

WIDTHS: list[dict[str, Any]] = [
    {"target_sigma": [[0, 9.0], [20, 3.0]]},
    {"target_sigma": 2.0, "target_sigma_per_side": [[5, 0.1], [25, 0.02]]},
]
IDS = torch.arange(START, START + K)
STEP = 11
RAMP = [[0, 0.0], [22, 1.0]]
KNOBS = {"coord_soft_ce_w1.ce_weight": 0.8, "coord_reg.w1_weight": 0.6}


@pytest.mark.parametrize("changes", WIDTHS)
def test_stage_1(changes: dict[str, Any]) -> None:
    logits, rows = make_batch()
    weights = Stage1Weights.from_mapping({"ce_weight": 0.5, "warmup": {"ce_weight": RAMP}, **changes})
    of_step = weights.at(STEP, KNOBS)
    inputs = LossInputs.from_logits(logits[rows.positions_R], rows, COLUMNS, of_step.needs(mass_monitor=True))
    loss = combine(stage1_terms(inputs, of_step), rows.num_text, rows.num_coord)
    config = {
        "custom": {"coord_soft_ce_w1": asdict(weights) | {"monitor_mass": True}},
        "training": {"packing": False},
    }
    equations = Stage1Equations(config, [vars(rows)], Sums(), defaultdict(list), STEP, KNOBS)
    audited = equations.add(Rows.of(vars(rows), logits.double(), IDS), 1)
    assert float(audited) == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("kind", [ForwardKind.TEACHER_FORCED, ForwardKind.ROLLOUT])
@pytest.mark.parametrize("changes", WIDTHS)
def test_stage_2(changes: dict[str, Any], kind: ForwardKind) -> None:
    logits, rows = make_batch(rollout=kind is ForwardKind.ROLLOUT)
    ramps = {
        "bbox_geo": {"weight": RAMP},
        "token_ce": {"desc_ce_weight": RAMP},
        "coord_reg": {"w1_weight": RAMP},
    }
    spec = make_spec(coord_reg=changes)
    spec = replace(spec, objective=tuple(replace(one, warmup=ramps[one.name]) for one in spec.objective))
    objective = Stage2Objective(spec)
    loss, terms = evaluate(objective.at(STEP, KNOBS), logits, rows, kind)
    section = {"coord_decode_mode": "exp", "pipeline": asdict(objective.spec)}
    sums = Sums()
    equations = Stage2Equations({"stage2_ab": section}, [vars(rows)], sums, defaultdict(list), STEP, KNOBS)
    audited = equations.add(Rows.of(vars(rows), logits.double(), IDS), kind)
    assert float(audited) == pytest.approx(loss.item(), rel=1e-5)
    values = sums.values()
    for key, atom in terms.atoms.items():
        assert values[key] == pytest.approx(float(atom.sum / atom.count), rel=1e-4), key
