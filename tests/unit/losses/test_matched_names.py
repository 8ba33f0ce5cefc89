"""Cross-entropy of names of matched objects: an atom of its own, over the denominator of all text."""

from __future__ import annotations

import math

import pytest
import torch
from support.objective import COLUMNS, TOKEN_CE, V, evaluate, make_spec

from coordexp.losses.inputs import SupervisedRows, TextRole
from coordexp.losses.modules import ForwardKind
from coordexp.losses.objective import Stage2Objective

NOTHING = torch.zeros(0, dtype=torch.int64)


def three_rows():
    """A missed object's structure and name, and a matched object's name, with probabilities 1/2, 1/4 and 1/8."""
    rows = SupervisedRows.from_slots(
        text_positions_R=torch.arange(3),
        text_targets_R=torch.tensor([1, 2, 3]),
        roles_R=torch.tensor([TextRole.STRUCT, TextRole.DESC, TextRole.MATCHED_DESC]),
        dropped_invalid_R=torch.zeros(3, dtype=torch.bool),
        slot_positions_N=NOTHING,
        bins_N=NOTHING,
        columns=COLUMNS,
        num_boxes=0,
    )
    logits = torch.full((3, V), -40.0)
    logits[:, 0] = 0.0
    for row, (target, p) in enumerate([(1, 0.5), (2, 0.25), (3, 0.125)]):
        logits[row, target] = math.log(p / (1 - p))  # against token 0
    return logits, rows


def spec_with(weight):
    return make_spec(token_ce={"rollout_matched_desc_weight": weight}, skip=("bbox_geo", "coord_reg"))


def test_by_hand():
    """Weights 1, .4 and .5 over their sum of 1.9, times the module's 1.1."""
    logits, rows = three_rows()
    loss, terms = evaluate(Stage2Objective(spec_with(0.5)), logits, rows, ForwardKind.ROLLOUT)
    log2, scale = math.log(2), 1.1 / 1.9
    atoms = {key.split("/")[2]: atom.mean().item() for key, atom in terms.atoms.items()}
    assert atoms == pytest.approx(
        {
            "struct_ce": scale * log2,
            "desc_ce": scale * TOKEN_CE["rollout_fn_desc_weight"] * 2 * log2,
            "matched_desc_ce": scale * 0.5 * 3 * log2,
        },
        rel=1e-5,
    )
    assert loss.item() == pytest.approx(sum(atoms.values()), rel=1e-6)


def test_without_a_weight_there_is_no_atom():
    logits, rows = three_rows()
    _, terms = evaluate(Stage2Objective(spec_with(0.0)), logits, rows, ForwardKind.ROLLOUT)
    assert set(terms.atoms) == {"loss/B_rollout_text/struct_ce", "loss/B_rollout_text/desc_ce"}
