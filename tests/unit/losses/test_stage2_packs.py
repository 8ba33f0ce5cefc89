"""The stage-2 objective over packs: how a step is cut, and packs that lack text, boxes or slots."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.objective import (
    COLUMNS,
    COORD_ATOMS,
    V,
    evaluate,
    make_batch,
    make_spec,
)

from coordexp.losses.inputs import SupervisedRows
from coordexp.losses.modules import ForwardKind
from coordexp.losses.objective import Stage2Objective, Stage2Terms


@pytest.mark.parametrize("forward", ForwardKind)
def test_a_step_may_be_cut_into_any_packs(forward):
    """Two packs with the counts of both: loss and logged atoms are those of one batch with all rows."""
    objective = Stage2Objective(make_spec())
    logits_a, rows_a = make_batch(seed=1)
    logits_b, rows_b = make_batch(seed=2, num_tokens=60, num_boxes=7)
    parts = [objective.counts(rows, forward) for rows in (rows_a, rows_b)]
    counts = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    losses, terms = zip(
        *(
            evaluate(objective, logits, rows, forward, counts)
            for logits, rows in ((logits_a, rows_a), (logits_b, rows_b))
        ),
        strict=True,
    )
    step = {key: value.mean().item() for key, value in Stage2Terms.merge(terms).metrics().items()}

    rows = join(rows_a, rows_b, len(logits_a))
    whole_loss, whole_terms = evaluate(objective, torch.cat([logits_a, logits_b]), rows, forward)
    whole = {key: value.mean().item() for key, value in whole_terms.metrics().items()}

    assert sum(losses).item() == pytest.approx(whole_loss.item(), rel=1e-5)
    totals = {key for key in whole if key.endswith("_total")}  # counters: summed, not averaged
    assert {key: step[key] for key in step if key not in totals} == pytest.approx(
        {key: whole[key] for key in whole if key not in totals}, rel=1e-5
    )
    assert sum(losses).item() == pytest.approx(
        sum(value for key, value in step.items() if key.startswith("loss/")), rel=1e-5
    )


def join(a, b, offset):
    """Rows of two batches laid end to end."""
    text = lambda name: torch.cat([getattr(rows, name)[: rows.num_text] for rows in (a, b)])  # noqa: E731
    shifted = replace(b, positions_R=b.positions_R + offset)

    def slots(of_a, of_b):
        """Boxes of both, then the other slots of both."""
        cut_a, cut_b = 4 * a.num_boxes, 4 * b.num_boxes
        return torch.cat([of_a[:cut_a], of_b[:cut_b], of_a[cut_a:], of_b[cut_b:]])

    return SupervisedRows.from_slots(
        torch.cat([a.positions_R[: a.num_text], shifted.positions_R[: b.num_text]]),
        text("targets_R"),
        torch.cat([a.roles_R, b.roles_R]),
        torch.cat([a.dropped_invalid_R, b.dropped_invalid_R]),
        slots(a.positions_R[a.num_text :], shifted.positions_R[b.num_text :]),
        slots(a.bins_N, b.bins_N),
        COLUMNS,
        num_boxes=a.num_boxes + b.num_boxes,
    )


@pytest.mark.parametrize("forward", ForwardKind)
def test_a_pack_without_slots_contributes_no_coordinate_term(forward):
    logits, rows = make_batch(num_boxes=0, num_vertices=0)
    z = logits.clone().requires_grad_()
    loss, terms = evaluate(Stage2Objective(make_spec()), z, rows, forward)
    loss.backward()

    assert torch.isfinite(z.grad).all()
    present = {key for key, value in terms.metrics().items() if value.count > 0}
    assert {key.split("/")[-1] for key in present} <= {"struct_ce", "desc_ce", "text_gate"}
    assert not any(key.startswith("coord_diag") for key in terms.metrics())


def without_polygons(rows):
    """The same rows up to the last box."""
    end = rows.num_text + 4 * rows.num_boxes
    return replace(
        rows,
        positions_R=rows.positions_R[:end],
        targets_R=rows.targets_R[:end],
        bins_N=rows.bins_N[: 4 * rows.num_boxes],
    )


def test_polygons_change_nothing_for_the_boxes_beside_them():
    """Box losses, their gradient and denominators are the same; what is summed over slots is added to."""
    objective = Stage2Objective(make_spec())
    logits, rows = make_batch()
    found = {}
    for name, some in (("both", rows), ("boxes", without_polygons(rows))):
        z = logits.clone().requires_grad_()
        counts = objective.counts(some, ForwardKind.ROLLOUT)
        _, terms = evaluate(objective, z, some, ForwardKind.ROLLOUT)
        spec = make_spec(skip=("token_ce", "coord_reg"))
        geo_loss, _ = evaluate(Stage2Objective(spec), z, some, ForwardKind.ROLLOUT)
        found[name] = terms.atoms, counts, torch.autograd.grad(geo_loss, z)[0]
    (both, both_counts, both_grad), (boxes, boxes_counts, boxes_grad) = found["both"], found["boxes"]
    torch.testing.assert_close(both_grad, boxes_grad, rtol=1e-6, atol=1e-9)
    for name in ("B_coord/boxes", "B_coord/text_gate", "B_rollout_text"):
        assert both_counts[name] == boxes_counts[name]
    assert (both_counts["B_coord/slots"], boxes_counts["B_coord/slots"]) == (18, 12)
    for key in boxes:
        if key.split("/")[-1] in ("bbox_smoothl1", "bbox_ciou", "text_gate", "struct_ce", "desc_ce"):
            torch.testing.assert_close(both[key], boxes[key])
        else:
            assert both[key].sum > boxes[key].sum
            assert (both[key].count, boxes[key].count) == (18, 12)


@pytest.mark.parametrize("decode_mode", ["exp", "st"])
def test_a_pack_of_polygons_alone_has_every_slot_loss_and_no_box_loss(decode_mode):
    logits, rows = make_batch(num_boxes=0, num_vertices=5)
    z = logits.clone().requires_grad_()
    loss, terms = evaluate(Stage2Objective(make_spec(), decode_mode), z, rows, ForwardKind.ROLLOUT)
    loss.backward()
    assert torch.isfinite(z.grad).all()
    assert (z.grad[rows.positions_R[rows.num_text :]].abs().sum(1) > 0).all()
    for name in COORD_ATOMS:
        assert (terms.atoms[f"loss/B_coord/{name}"].sum > 0) == (not name.startswith("bbox"))


def test_a_pack_without_any_row():
    nothing = torch.zeros(0, dtype=torch.int64)
    rows = SupervisedRows.from_slots(
        nothing, nothing, nothing, nothing.bool(), nothing, nothing, COLUMNS, num_boxes=0
    )
    z = torch.randn(5, V, requires_grad=True)
    loss, terms = evaluate(Stage2Objective(make_spec()), z, rows, ForwardKind.ROLLOUT)
    loss.backward()
    assert loss.item() == 0
    assert z.grad.abs().max() == 0
    assert all(value.count == 0 for value in terms.metrics().values())
