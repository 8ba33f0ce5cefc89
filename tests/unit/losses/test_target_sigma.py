"""Widths of soft targets: points over the run, and in proportion to the sides of boxes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.objective import COLUMNS, COORD_REG, evaluate, make_batch, make_spec

from coordexp.errors import ContractError
from coordexp.losses.coord import box_sides, gaussian_targets, sigma_rows
from coordexp.losses.inputs import LossInputs, SupervisedRows
from coordexp.losses.modules import ForwardKind
from coordexp.losses.objective import Stage2Objective
from coordexp.losses.stage1 import Stage1Weights, stage1_loss, stage1_terms

B_SOFT_CE = "loss/B_coord/coord_soft_ce"


def test_a_target_has_the_width_of_its_row() -> None:
    """sigma 1 and 2 around bin 1 of 4: weights exp(-d^2 / 2) and exp(-d^2 / 8) of distances 1, 0, 1, 2."""
    q_NK = gaussian_targets(torch.tensor([1, 1]), 4, torch.tensor([1.0, 2.0]))
    narrow = [math.exp(-0.5), 1.0, math.exp(-0.5), math.exp(-2.0)]
    wide = [math.exp(-0.125), 1.0, math.exp(-0.125), math.exp(-0.5)]
    expected = torch.tensor([[value / sum(row) for value in row] for row in (narrow, wide)])
    torch.testing.assert_close(q_NK, expected)
    torch.testing.assert_close(q_NK[:1], gaussian_targets(torch.tensor([1]), 4, 1.0))


def test_a_coordinate_has_its_share_of_the_side_along_its_axis_but_never_less_than_target_sigma() -> None:
    """A box of 200 x 20 bins, per side 0.05: x 10, y 1; with target_sigma 2 the y take 2, as vertices do."""
    sides_N = torch.cat([box_sides(torch.tensor([[100, 50, 300, 70]])), torch.zeros(2)])
    assert sides_N.tolist() == [200, 20, 200, 20, 0, 0]
    sigma_N = sigma_rows(2.0, 0.05, sides_N)
    assert isinstance(sigma_N, torch.Tensor)
    torch.testing.assert_close(sigma_N, torch.tensor([10.0, 2.0, 10.0, 2.0, 2.0, 2.0]))
    assert sigma_rows(2.0, None, sides_N) == 2.0
    with pytest.raises(ContractError, match="do not tell the sides"):
        sigma_rows(2.0, 0.05, None)


def test_stage_2_rows_know_the_sides_of_their_boxes_and_keep_them_in_pieces() -> None:
    _, rows = make_batch(num_boxes=2, num_vertices=3)
    assert rows.sides_N is not None
    x1, y1, x2, y2 = rows.bins_N[4:8].tolist()
    assert rows.sides_N[4:].tolist() == [x2 - x1, y2 - y1, x2 - x1, y2 - y1, 0, 0, 0, 0, 0, 0]
    pieces = [piece.sides_N for _, piece in rows.chunks(5) if piece.num_coord]
    assert torch.cat([piece for piece in pieces if piece is not None]).tolist() == rows.sides_N.tolist()


@pytest.mark.parametrize("per_side", [None, 0.03, [[0, 0.09], [20, 0.03]]])
def test_both_stages_teach_the_width_of_the_step(per_side) -> None:
    """Against soft cross-entropies in float64, row by row, at a step between two points."""
    settings = {"target_sigma": [[0, 9.0], [20, 3.0]], "target_sigma_per_side": per_side}
    logits, rows = make_batch(num_boxes=3, num_vertices=3)
    step, sigma = 15, 4.5  # 9 - 6 * 15 / 20
    factor = None if per_side is None else 0.03 if per_side == 0.03 else 0.045
    stage2 = Stage2Objective(make_spec(coord_reg=settings | {"target_truncate": None})).at(step)
    _, terms = evaluate(stage2, logits, rows, ForwardKind.ROLLOUT)

    z_NK = logits.double()[rows.positions_R[rows.num_text :]][:, 20:1020]
    T, k = COORD_REG["temperature"], torch.arange(1000, dtype=torch.float64)
    expected = {T: 0.0, 1.0: 0.0}
    for n, (z_K, g) in enumerate(zip(z_NK, rows.bins_N.tolist(), strict=True)):
        x1, y1, x2, y2 = rows.bins_N[n - n % 4 :][:4].tolist() if n < 12 else (0, 0, 0, 0)
        width = max(sigma, (factor or 0.0) * ((x2 - x1) if n % 2 == 0 else (y2 - y1)))
        q_K = torch.exp(-((k - g) ** 2) / (2 * width**2))
        for temperature in expected:
            expected[temperature] -= float((q_K / q_K.sum() * (z_K / temperature).log_softmax(0)).sum())
    weight = 1.3 * COORD_REG["soft_ce_weight"]  # channel B
    assert terms.atoms[B_SOFT_CE].sum.item() == pytest.approx(weight * expected[T], rel=1e-5)

    weights = Stage1Weights.from_mapping(settings).at(step)
    inputs = LossInputs.from_logits(logits[rows.positions_R], rows, COLUMNS, weights.needs())
    assert stage1_terms(inputs, weights).raw["soft_ce"].sum.item() == pytest.approx(expected[1.0], rel=1e-5)


def test_an_objective_without_points_is_one_for_all_steps() -> None:
    fixed, narrowing = (
        Stage2Objective(make_spec(coord_reg={"target_sigma": sigma}))
        for sigma in (3.0, [[0, 3.0], [10, 1.0]])
    )
    assert fixed.at(5) is fixed
    assert narrowing.at(5) is narrowing.at(5)
    assert [narrowing.at(step).spec.find("coord_reg").config.target_sigma for step in (0, 5, 90)] == [
        3.0,
        2.0,
        1.0,
    ]


def test_evaluation_and_scripts_measure_with_the_last_point() -> None:
    """So that losses of different steps can be compared."""
    weights = Stage1Weights.from_mapping({"target_sigma": [[0, 8.0], [10, 2.0]]})
    assert weights.settled() == Stage1Weights(target_sigma=2.0)
    logits = torch.randn(1, 6, 1060, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, 3, 140, 700, 5, 6]])
    found = [
        stage1_loss(logits, labels, range(40, 1040), w)[0] for w in (weights, Stage1Weights(target_sigma=2.0))
    ]
    assert found[0] == found[1]


def test_rows_of_labels_do_not_know_their_boxes() -> None:
    rows = SupervisedRows.from_labels(torch.tensor([[-100, 3, 25, 26, 27, 28]]), COLUMNS)
    inputs = LossInputs.from_logits(torch.zeros(rows.num_rows, 1030), rows, COLUMNS, Stage1Weights().needs())
    with pytest.raises(ContractError, match="do not tell the sides"):
        stage1_terms(inputs, Stage1Weights(target_sigma_per_side=0.1))
    known = replace(inputs, rows=replace(rows, sides_N=torch.full((4,), 50.0)))
    wide, narrow = (
        stage1_terms(known, Stage1Weights(target_sigma_per_side=share)).raw["soft_ce"].sum
        for share in (0.1, None)
    )
    torch.testing.assert_close(wide, narrow)  # of a flat distribution every target has the same cross-entropy
