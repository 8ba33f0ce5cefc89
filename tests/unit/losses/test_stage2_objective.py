"""The stage-2 objective: every atom against a float64 computation, and the rules that hold between them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.objective import (
    COLUMNS,
    COORD_ATOMS,
    COORD_REG,
    PROVENANCES,
    SCALES,
    START,
    K,
    V,
    evaluate,
    make_batch,
    make_spec,
)
from torchvision.ops import complete_box_iou_loss

from coordexp.errors import ContractError
from coordexp.losses.inputs import LossInputs, SupervisedRows, TextRole
from coordexp.losses.modules import ForwardKind
from coordexp.losses.objective import Stage2Objective, check_atoms_sum


def role_weight(forward, role, dropped):
    """The table of weights, once more, by hand."""
    if forward is ForwardKind.ROLLOUT:
        struct = 2.5 if dropped else 1.0
        weights = {TextRole.STRUCT: struct, TextRole.DESC: 0.4, TextRole.MATCHED_STRUCT: 0.6}
    elif forward is ForwardKind.SELF_CONTEXT:
        weights = {TextRole.STRUCT: 1.0, TextRole.DESC: 0.0, TextRole.MATCHED_STRUCT: 0.0}
    else:
        weights = {TextRole.STRUCT: 1.0, TextRole.DESC: 0.7, TextRole.MATCHED_STRUCT: 0.0}
    return (weights | {TextRole.CLOSE: 1.0, TextRole.EOS: 1.0})[role]


def reference_atoms(logits, rows, forward):
    """Every atom of the forward in float64, row by row, from the formulas."""
    z = logits.double()[rows.positions_R]
    T, coord = COORD_REG["temperature"], slice(START, START + K)
    text = {"struct_ce": [], "desc_ce": []}
    total_weight, gates = 0.0, []
    for n in range(rows.num_text):
        role, dropped = TextRole(int(rows.roles_R[n])), bool(rows.dropped_invalid_R[n])
        weight = role_weight(forward, role, dropped)
        ce = z[n].logsumexp(0) - z[n, rows.targets_R[n]]
        text["desc_ce" if role is TextRole.DESC else "struct_ce"].append(weight * ce)
        total_weight += weight
        if (
            weight > 0
            and role is not TextRole.EOS
            and not (role is TextRole.DESC and forward is not ForwardKind.ROLLOUT)
        ):
            p_coord = (z[n] / T).softmax(0)[coord].sum()
            gates.append(-torch.log(1 - p_coord))
    text_scale = SCALES["token_ce"] * (0.3 if forward is ForwardKind.SELF_CONTEXT else 1.0)
    atoms = {
        f"{forward.text}/{name}": text_scale * sum(values) / total_weight
        for name, values in text.items()
        if not (name == "desc_ce" and forward is ForwardKind.SELF_CONTEXT)
    }
    if forward.coord is None:
        return atoms

    k = torch.arange(K, dtype=torch.float64)
    slots = {name: [] for name in COORD_ATOMS if name.startswith("coord_")}
    centres = []
    for row, g in zip(z[rows.num_text :], rows.bins_N.tolist(), strict=True):
        c = row[coord]
        log_p = (c / T).log_softmax(0)
        p = log_p.exp()
        q = torch.exp(-((k - g) ** 2) / (2 * 3.0**2)) * ((k - g).abs() <= 12)
        q = q / q.sum()
        d = (k - g).abs() / 999
        slots["coord_token_ce"].append(-c.log_softmax(0)[g])
        slots["coord_soft_ce"].append(-(q * log_p).sum())
        slots["coord_w1"].append((p.cumsum(0) - q.cumsum(0)).abs().sum() / 999)
        slots["coord_el1"].append((p * d).sum())
        slots["coord_ehuber"].append((p * torch.where(d <= 0.05, d**2 / 0.1, d - 0.025)).sum())
        slots["coord_entropy"].append(-(p * log_p).sum())
        slots["coord_gate"].append((row / T).logsumexp(0) - (c / T).logsumexp(0))
        centres.append((p * k).sum() / 999)
    of_boxes = slice(0, 4 * rows.num_boxes)
    pred_B4 = torch.stack(centres[of_boxes]).view(-1, 4)
    gt_B4 = rows.bins_N[of_boxes].double().view(-1, 4) / 999
    lo, hi = torch.minimum(pred_B4[:, :2], pred_B4[:, 2:]), torch.maximum(pred_B4[:, :2], pred_B4[:, 2:])
    geo, reg = SCALES["bbox_geo"], SCALES["coord_reg"]
    d = (pred_B4 - gt_B4).abs()  # below 1, so the quadratic part of smooth L1
    atoms[f"{forward.coord}/bbox_smoothl1"] = geo * 1.5 * (d**2 / 2).mean()
    atoms[f"{forward.coord}/bbox_ciou"] = (
        geo * 0.8 * complete_box_iou_loss(999 * torch.cat([lo, hi], 1), 999 * gt_B4, "mean")
    )
    extra = 0.05 if forward.channel == "A" else 0.0
    weights = {
        "coord_token_ce": 0.1,
        "coord_soft_ce": 0.7 + extra,
        "coord_w1": 0.9,
        "coord_el1": 0.2,
        "coord_ehuber": 0.3,
        "coord_entropy": 0.4,
        "coord_gate": 0.5,
    }
    for name, values in slots.items():
        atoms[f"{forward.coord}/{name}"] = reg * weights[name] * torch.stack(values).mean()
    atoms[f"{forward.coord}/text_gate"] = reg * 0.6 * torch.stack(gates).mean()
    return atoms


@pytest.mark.parametrize("forward", ForwardKind)
def test_atoms_loss_and_gradient_match_float64(forward):
    logits, rows = make_batch(rollout=forward is ForwardKind.ROLLOUT)
    ours_in, ref_in = logits.clone().requires_grad_(), logits.double().requires_grad_()

    loss, terms = evaluate(Stage2Objective(make_spec()), ours_in, rows, forward)
    expected = reference_atoms(ref_in, rows, forward)
    loss.backward()
    sum(expected.values()).backward()

    atoms = {key.removeprefix("loss/"): value.mean().item() for key, value in terms.atoms.items()}
    assert atoms == pytest.approx({key: value.item() for key, value in expected.items()}, rel=2e-5)
    assert set(atoms) == PROVENANCES[forward]
    assert loss.item() == pytest.approx(sum(atoms.values()), rel=1e-5)
    torch.testing.assert_close(
        ours_in.grad.double(), ref_in.grad, rtol=1e-4, atol=1e-5 * ref_in.grad.abs().max().item()
    )


@pytest.mark.parametrize("mode", ["exp", "st"])
def test_box_decode_mode(mode):
    """`st` decodes the argmax; with the argmax at the true bins both box losses vanish."""
    logits, rows = make_batch()
    logits = logits.clone()
    logits[rows.positions_R[rows.num_text :], START + rows.bins_N] = 14.0  # likeliest, but not certain
    objective = Stage2Objective(make_spec(skip=("token_ce", "coord_reg")), decode_mode=mode)
    z = logits.requires_grad_()
    loss, _ = evaluate(objective, z, rows, ForwardKind.ROLLOUT)
    loss.backward()
    assert (loss.item() < 1e-5) == (mode == "st")
    assert torch.isfinite(z.grad).all()


# --- rules between atoms -------------------------------------------------------------------------------


@pytest.mark.parametrize("forward", ForwardKind)
def test_zero_weight_atoms_are_absent(forward):
    spec = make_spec(
        token_ce={"desc_ce_weight": 0.0, "rollout_fn_desc_weight": 0.0, "self_context_struct_ce_weight": 0.0},
        bbox_geo={"ciou_weight": 0.0},
        coord_reg={f"{name}_weight": 0.0 for name in ["coord_ce", "coord_el1", "coord_gate", "text_gate"]},
        diagnostics=False,
    )
    gone = ["desc_ce", "bbox_ciou", "coord_token_ce", "coord_el1", "coord_gate", "text_gate"]
    logits, rows = make_batch()
    objective = Stage2Objective(spec)
    loss, terms = evaluate(objective, logits, rows, forward)

    expected = {f"loss/{key}" for key in PROVENANCES[forward] if key.split("/")[1] not in gone}
    assert set(terms.metrics()) == expected - {"loss/A2_text/struct_ce"}
    assert loss.item() == pytest.approx(sum(atom.mean().item() for atom in terms.atoms.values()), rel=1e-5)
    assert not objective.needs(forward).coord_full_vocab


def test_modules_act_only_in_their_channels():
    objective = Stage2Objective(make_spec(channels=["B"], diagnostics=False))
    logits, rows = make_batch()
    z = logits.clone().requires_grad_()
    loss, terms = evaluate(objective, z, rows, ForwardKind.TEACHER_FORCED)
    loss.backward()
    assert terms.metrics() == {}
    assert loss.item() == 0
    assert z.grad.abs().max() == 0
    assert set(evaluate(objective, logits, rows, ForwardKind.ROLLOUT)[1].atoms) == {
        f"loss/{key}" for key in PROVENANCES[ForwardKind.ROLLOUT]
    }


@pytest.mark.parametrize("forward", ForwardKind)
def test_unsupervised_tokens_cannot_change_anything(forward):
    """Tokens without a row (unmatched predictions among them) may have any logits."""
    logits, rows = make_batch()
    objective = Stage2Objective(make_spec())
    free = torch.ones(len(logits), dtype=torch.bool)
    free[rows.positions_R] = False
    other = torch.where(free.unsqueeze(1), torch.full_like(logits, 77.0), logits)

    results = []
    for values in (logits, other):
        z = values.clone().requires_grad_()
        loss, terms = evaluate(objective, z, rows, forward)
        loss.backward()
        results.append((loss, z.grad, {key: value.mean() for key, value in terms.metrics().items()}))

    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]
    assert results[0][1][free].abs().max() == 0


@pytest.mark.parametrize("forward", ForwardKind)
@pytest.mark.parametrize("coord_reg", [{}, {"text_gate_weight": 0.0}], ids=["all", "without_text_gate"])
def test_atoms_over_one_denominator_can_be_computed_alone(forward, coord_reg):
    """Other counts infinite: what is left adds up, over all denominators, to loss and gradient of the whole."""
    objective = Stage2Objective(make_spec(coord_reg=coord_reg))
    logits, rows = make_batch(rollout=forward is ForwardKind.ROLLOUT)
    counts = objective.counts(rows, forward)

    def loss_and_gradient(divisors):
        z = logits.double().requires_grad_()
        loss, _ = evaluate(objective, z, rows, forward, divisors)
        loss.backward()
        return loss.detach(), z.grad

    whole, gradient = loss_and_gradient(counts)
    names = [name for name in counts if not ("text_gate" in name and "text_gate_weight" in coord_reg)]
    off = dict.fromkeys(counts, torch.tensor(math.inf))
    parts = [loss_and_gradient(off | {name: counts[name]}) for name in names]
    assert sum(loss for loss, _ in parts).item() == pytest.approx(whole.item(), rel=1e-6)
    torch.testing.assert_close(sum(z_grad for _, z_grad in parts), gradient, rtol=1e-6, atol=1e-9)
    assert all(loss.item() > 0 for loss, _ in parts)  # no pass without an atom


# --- diagnostics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forward", "name"),
    [
        (ForwardKind.TEACHER_FORCED, "A1"),
        (ForwardKind.ANCHOR, "A1"),
        (ForwardKind.SELF_CONTEXT, "A2"),
        (ForwardKind.ROLLOUT, "B"),
    ],
)
def test_diagnostics_are_logged_under_the_forward_they_come_from(forward, name):
    logits, rows = make_batch()
    _, terms = evaluate(Stage2Objective(make_spec()), logits, rows, forward)
    diagnostics = {
        key: value.mean().item() for key, value in terms.metrics().items() if key.startswith("coord_diag")
    }
    names = (
        "coord_tokens_total acc_top5 p_gt_mean margin_mean expected_bin_mae expected_bin_abs_err_p90 "
        "coord_vocab_mass_mean"
    )
    assert set(diagnostics) == {f"coord_diag/{name}/{key}" for key in names.split()}
    z = logits.double()[rows.positions_R[rows.num_text :]] / COORD_REG["temperature"]
    p = z[:, START : START + K].softmax(-1)
    error = (p @ torch.arange(K, dtype=torch.float64) - rows.bins_N).abs()
    assert diagnostics[f"coord_diag/{name}/expected_bin_mae"] == pytest.approx(error.mean().item(), rel=1e-5)
    assert diagnostics[f"coord_diag/{name}/coord_tokens_total"] == 18  # 3 boxes, 3 vertices
    mass = z.softmax(-1)[:, START : START + K].sum(-1).mean().item()
    assert diagnostics[f"coord_diag/{name}/coord_vocab_mass_mean"] == pytest.approx(mass, rel=1e-5)


def test_diagnostics_change_no_loss_and_no_gradient():
    logits, rows = make_batch()
    results = []
    for watch in (True, False):
        z = logits.clone().requires_grad_()
        loss, _ = evaluate(Stage2Objective(make_spec(diagnostics=watch)), z, rows, ForwardKind.ROLLOUT)
        loss.backward()
        results.append((loss, z.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


# --- contracts -----------------------------------------------------------------------------------------


def test_the_hot_path_never_reads_a_value_from_the_device():
    """Meta tensors have no values: anything that waits for the device would raise on them."""

    def meta(*shape, dtype=torch.int64):
        return torch.empty(*shape, dtype=dtype, device="meta")

    objective = Stage2Objective(make_spec(), decode_mode="st")
    rows = SupervisedRows.from_slots(
        meta(6), meta(6), meta(6), meta(6, dtype=torch.bool), meta(11), meta(11), COLUMNS, num_boxes=2
    )
    z = meta(rows.num_rows, V, dtype=torch.float32).requires_grad_()
    for forward in ForwardKind:
        inputs = LossInputs.from_logits(z, rows, COLUMNS, objective.needs(forward))
        loss, terms = objective(inputs, forward, objective.counts(rows, forward))
        loss.backward()
        assert {key.removeprefix("loss/") for key in terms.atoms} == PROVENANCES[forward]
        terms.metrics()


def test_inputs_made_for_another_purpose_are_refused():
    logits, rows = make_batch()
    objective = Stage2Objective(make_spec())
    inputs = LossInputs.from_logits(
        logits[rows.positions_R],
        rows,
        COLUMNS,
        replace(objective.needs(ForwardKind.ROLLOUT), text_odds=False),
    )
    with pytest.raises(ContractError, match="text_log_odds_R is missing"):
        objective(inputs, ForwardKind.ROLLOUT, objective.counts(rows, ForwardKind.ROLLOUT))
    with pytest.raises(ContractError, match="role"):
        objective.counts(replace(rows, roles_R=None), ForwardKind.ROLLOUT)


def test_debug_check_of_the_sum_of_atoms():
    check_atoms_sum(0.75, {"loss/B_coord/bbox_ciou": 0.5, "loss/B_rollout_text/struct_ce": 0.25 + 5e-7})
    check_atoms_sum(0.0, {})
    with pytest.raises(ContractError, match=r"loss/B_coord/bbox_ciou = 0\.5"):
        check_atoms_sum(0.75, {"loss/B_coord/bbox_ciou": 0.5})
    with pytest.raises(ContractError, match="not the sum"):
        check_atoms_sum(math.nan, {"loss/B_coord/bbox_ciou": 0.5})
