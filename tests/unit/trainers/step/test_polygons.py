"""Polygons in stage 2: what a step teaches their vertices, against float64 formulas written down here once more."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.stage1_head import load
from support.stage2 import BBOX_GEO, COORD_REG, rollout_aligned
from support.steps import WrittenAnswers, assembly, box, layout, objective, raw, teacher
from torchvision.ops import complete_box_iou_loss
from transformers import AutoTokenizer

from coordexp.codec.schema import BoxObject
from coordexp.codec.serialize import serialize
from coordexp.config import Prompt, parse_sections
from coordexp.head.run import RowsHead
from coordexp.losses.modules import ForwardKind
from coordexp.models.self_context import SelfContext
from coordexp.targets.builder import TargetBuilder
from coordexp.trainers.runtime import RunSettings
from coordexp.trainers.stage2_parts import make_builder
from coordexp.trainers.step.planners import GroundTruthPlanner, RolloutPlanner
from coordexp.trainers.step.runner import PlainRunner, SelfContextRunner

END = "<|im_end|>"


def poly(desc, *bins):
    return BoxObject(desc, "poly", bins)


CAT, DOG = box("cat", 100, 100, 300, 300), box("dog", 500, 500, 800, 800)
HILL = poly("red hill", 100, 600, 180, 610, 300, 640, 310, 900, 120, 930)
POND = poly("blue box", 600, 100, 900, 150, 700, 400)
NEAR_CAT = box("cat", 110, 90, 290, 310)
NEAR_HILL = poly("hill", 103, 604, 290, 650, 301, 880, 108, 940)
NOTHING = poly("dog", 10, 10, 40, 15, 20, 60)


@pytest.fixture(scope="module")
def tok(nano):
    return AutoTokenizer.from_pretrained(nano)


@pytest.fixture
def model(nano):
    return load(nano).double()


def rollout_plan(tok, raws, answers, packing_length):
    backend = WrittenAnswers(tok, answers, policy_version=1)
    return RolloutPlanner(teacher(tok, backend), TargetBuilder(tok), assembly(tok, packing_length))(raws, 0)


def runner(tok, head="plain"):
    columns = layout(tok, None).columns
    return PlainRunner(RowsHead(head, columns), objective(), columns, checks_atoms=True)


def run_step(model, run, plan):
    """Loss of the step, its gradient, and the sums of its atoms."""
    model.zero_grad()
    loss, sums = 0.0, {}
    for forward in plan.counted:
        outcome = run(model, model, forward, plan)
        outcome.loss.backward()
        loss += float(outcome.loss.detach())
        for key, atom in outcome.metrics.items():
            sums[key] = sums.get(key, 0.0) + float(atom[0])
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return loss, gradient, sums


# --- against the formulas ----------------------------------------------------------------------------------


def barycentric_bins(pred, gt, epsilon=10.0, iters=30):
    """Sinkhorn with the kernel itself (no logarithms), cost = Euclidean distance in bins; whole bins."""
    pred_N2, gt_M2 = np.reshape(pred, (-1, 2)).astype(float), np.reshape(gt, (-1, 2)).astype(float)
    kernel = np.exp(-np.sqrt(((pred_N2[:, None] - gt_M2[None]) ** 2).sum(-1)) / epsilon)
    v = np.ones(len(gt_M2))
    for _ in range(iters):
        u = (1 / len(pred_N2)) / (kernel @ v)
        v = (1 / len(gt_M2)) / (kernel.T @ u)
    plan = u[:, None] * kernel * v
    points = plan @ gt_M2 / plan.sum(1, keepdims=True)
    fractions = np.abs(points - np.floor(points) - 0.5)
    assert fractions.min() > 1e-6  # no coordinate is a tie
    return [int(k) for k in np.round(points).ravel()]


def taught_slots(model, tok, sample, taught):
    """Coordinate logits [N, 1000] and all logits of the rows before the taught coordinates, and their bins.

    taught: bins of each object in the order of the text; None for one that teaches nothing.
    """
    columns = layout(tok, None).columns
    ids = torch.from_numpy(sample.token_ids_T.copy())
    with torch.no_grad():
        logits_TV = model(input_ids=ids[None]).logits[0]
    places = [t for t in range(len(ids)) if int(ids[t]) in columns.ids]
    assert len(places) == sum(len(bins) if bins else width for bins, width in taught)
    rows, bins, start = [], [], 0
    for own, width in taught:
        if own is not None:
            rows += [place - 1 for place in places[start : start + width]]
            bins += list(own)
        start += width
    return logits_TV[rows].double(), torch.tensor(columns.ids), torch.tensor(bins)


def slot_terms(z_NV, coord_ids, bins_N):
    """Sum over slots of every coord_reg term, from the formulas."""
    k = torch.arange(1000, dtype=torch.float64)
    sums = dict.fromkeys(("token_ce", "soft_ce", "w1", "el1", "ehuber", "entropy", "gate"), 0.0)
    delta, sigma = COORD_REG["coord_huber_delta"], COORD_REG["target_sigma"]
    for z, g in zip(z_NV, bins_N.tolist(), strict=True):
        c = z[coord_ids]
        log_p = c - c.logsumexp(0)
        p = log_p.exp()
        q = torch.exp(-((k - g) ** 2) / (2 * sigma**2))
        q /= q.sum()
        d = (k - g).abs() / 999
        sums["token_ce"] -= log_p[g]
        sums["soft_ce"] -= (q * log_p).sum()
        sums["w1"] += (p.cumsum(0) - q.cumsum(0)).abs().sum() / 999
        sums["el1"] += (p * d).sum()
        sums["ehuber"] += (p * torch.where(d <= delta, d**2 / (2 * delta), d - delta / 2)).sum()
        sums["entropy"] -= (p * log_p).sum()
        sums["gate"] += z.logsumexp(0) - c.logsumexp(0)
    return {f"coord_{name}": float(value) for name, value in sums.items()}


WEIGHT_OF = {
    "coord_token_ce": COORD_REG["coord_ce_weight"],
    "coord_soft_ce": COORD_REG["soft_ce_weight"],
    "coord_w1": COORD_REG["w1_weight"],
    "coord_el1": COORD_REG["coord_el1_weight"],
    "coord_ehuber": COORD_REG["coord_ehuber_weight"],
    "coord_entropy": COORD_REG["coord_entropy_weight"],
    "coord_gate": COORD_REG["coord_gate_weight"],
}


def assert_slot_atoms(sums, provenance, z_NV, coord_ids, bins_N, extra_soft_ce=0.0):
    expected = slot_terms(z_NV, coord_ids, bins_N)
    for name, weight in WEIGHT_OF.items():
        weight += extra_soft_ce if name == "coord_soft_ce" else 0.0
        assert sums[f"loss/{provenance}/{name}"] == pytest.approx(weight * expected[name], rel=1e-9), name


def test_vertices_of_a_rollout_are_taught_their_transport_and_missed_ones_their_own_bins(tok, model):
    """Answered: a matched box, a matched polygon of other vertices, a polygon of nothing. Missed: one of each."""
    raws = [raw(tok, 1, CAT, HILL, DOG, POND)]
    plan = rollout_plan(tok, raws, [serialize([NEAR_CAT, NEAR_HILL, NOTHING]) + END], 1000)
    (sample,) = plan.rolled_out.samples
    assert sample.target_text == serialize([NEAR_CAT, NEAR_HILL, NOTHING, DOG, POND]) + END
    hill_bins = barycentric_bins(NEAR_HILL.bins, HILL.bins)
    assert hill_bins != list(NEAR_HILL.bins)
    taught = [(CAT.bins, 4), (hill_bins, 8), (None, 6), (DOG.bins, 4), (POND.bins, 6)]
    _, _, sums = run_step(model, runner(tok), plan)
    z_NV, coord_ids, bins_N = taught_slots(model, tok, sample, taught)
    assert_slot_atoms(sums, "B_coord", z_NV, coord_ids, bins_N)
    assert float(plan.totals["B_coord/slots"]) == 4 + 8 + 4 + 6
    assert float(plan.totals["B_coord/boxes"]) == 2
    # The box losses are of the two boxes alone.
    of_boxes = [0, 1, 2, 3, 12, 13, 14, 15]
    p = z_NV[of_boxes][:, coord_ids].softmax(-1)
    pred_B4 = (p @ torch.arange(1000.0, dtype=torch.float64)).view(2, 4)
    gt_B4 = bins_N[of_boxes].double().view(2, 4)
    smooth = torch.nn.functional.smooth_l1_loss(pred_B4 / 999, gt_B4 / 999, reduction="sum")
    ordered_B4 = torch.cat(
        [torch.minimum(pred_B4[:, :2], pred_B4[:, 2:]), torch.maximum(pred_B4[:, :2], pred_B4[:, 2:])], 1
    )
    ciou = complete_box_iou_loss(ordered_B4, gt_B4, reduction="sum")
    assert sums["loss/B_coord/bbox_smoothl1"] == pytest.approx(
        BBOX_GEO["smoothl1_weight"] * float(smooth), rel=1e-6
    )
    assert sums["loss/B_coord/bbox_ciou"] == pytest.approx(BBOX_GEO["ciou_weight"] * float(ciou), rel=1e-6)


def test_vertices_of_the_ground_truth_are_taught_in_channel_a(tok, model):
    raws, builder = [raw(tok, 1, CAT, HILL)], TargetBuilder(tok)
    plan = GroundTruthPlanner(builder, assembly(tok, None))(raws, 0)
    _, _, sums = run_step(model, runner(tok), plan)
    sample = builder.from_ground_truth(raws[0].prompt_ids, raws[0].objects, sample_id="a")
    slots = taught_slots(model, tok, sample, [(CAT.bins, 4), (HILL.bins, 10)])
    assert_slot_atoms(sums, "A2_coord", *slots, COORD_REG["self_context_soft_ce_weight"])


def test_self_context_replaces_vertices_too(tok, model):
    """In the last forward every coordinate token but the first depends on what the model expected before it."""
    raws = [raw(tok, 1, CAT, HILL)]
    plan = GroundTruthPlanner(TargetBuilder(tok), assembly(tok, None), num_forwards=2)(raws, 0)
    (forward,) = plan.forwards
    ids = forward.inputs["input_ids"].flatten()[forward.slots_N].tolist()
    assert ids == [layout(tok, None).columns.ids[k] for k in (*CAT.bins, *HILL.bins)]
    chained = SelfContextRunner(runner(tok), SelfContext(num_forwards=2))
    _, _, sums = run_step(model, chained, plan)
    only_boxes = replace(plan, forwards=(replace(forward, slots_N=forward.slots_N[:4]),))
    _, _, fewer = run_step(model, chained, only_boxes)
    assert sums["loss/A2_coord/coord_w1"] != pytest.approx(fewer["loss/A2_coord/coord_w1"], rel=1e-4)


# --- one number, however it is computed ----------------------------------------------------------------------

RAWS = ((CAT, HILL, DOG, POND), (POND, DOG), (CAT,))
ANSWERS = (serialize([NEAR_CAT, NEAR_HILL, NOTHING]) + END, "no idea" + END, serialize([NEAR_CAT]))


@pytest.mark.parametrize("head", ["plain", "fused"])
@pytest.mark.parametrize("packing_length", [None, 300, 1000], ids=["padded", "packs", "pack"])
def test_heads_and_packing_agree(tok, model, head, packing_length):
    raws = [raw(tok, n, *objects) for n, objects in enumerate(RAWS)]
    whole = run_step(model, runner(tok), rollout_plan(tok, raws, ANSWERS, 1000))
    found = run_step(model, runner(tok, head), rollout_plan(tok, raws, ANSWERS, packing_length))
    assert found[0] == pytest.approx(whole[0], rel=1e-6)
    assert float((found[1] - whole[1]).norm() / whole[1].norm()) < 1e-6
    for key, value in whole[2].items():
        if key.startswith("loss/"):
            assert found[2][key] == pytest.approx(value, rel=1e-6, abs=1e-9)


def test_two_ranks_agree_with_one(tok, model):
    """One rank holds polygons only, the other boxes only; totals are added up as all_reduce does."""
    objects, answers = ((HILL, POND), (CAT, DOG)), (serialize([NEAR_HILL]) + END, serialize([NEAR_CAT]) + END)
    raws = [raw(tok, n, *own) for n, own in enumerate(objects)]
    loss, gradient, _ = run_step(model, runner(tok), rollout_plan(tok, raws, answers, None))
    ranks = [rollout_plan(tok, [one], [answer], None) for one, answer in zip(raws, answers, strict=True)]
    totals = {name: ranks[0].totals[name] + ranks[1].totals[name] for name in ranks[0].totals}
    parts = [run_step(model, runner(tok), replace(plan, totals=totals)) for plan in ranks]
    assert sum(part[0] for part in parts) == pytest.approx(loss, rel=1e-6)
    both = parts[0][1] + parts[1][1]
    assert float((both - gradient).norm() / gradient.norm()) < 1e-6
    assert [float(plan.totals["B_coord/boxes"]) for plan in ranks] == [0, 2]


def test_a_polygon_changes_no_target_and_no_box_loss_of_the_boxes_beside_it(tok, model):
    """A polygon behind the boxes: rows before it see the same context, so their numbers must be the same."""
    found = []
    for objects, answer in (((CAT, DOG), [NEAR_CAT]), ((CAT, DOG, POND), [NEAR_CAT])):
        plan = rollout_plan(tok, [raw(tok, 1, *objects)], [serialize(answer) + END], None)
        _, _, sums = run_step(model, runner(tok), plan)
        found.append((sums, plan.totals["B_coord/boxes"], plan.forwards[0].meta.rows.bins_N[:8].tolist()))
    (alone, boxes, bins), (beside, boxes_beside, bins_beside) = found
    assert (boxes, bins) == (boxes_beside, bins_beside)
    for name in ("bbox_smoothl1", "bbox_ciou"):
        assert beside[f"loss/B_coord/{name}"] == pytest.approx(alone[f"loss/B_coord/{name}"], rel=1e-9)
    assert beside["loss/B_coord/coord_w1"] > alone["loss/B_coord/coord_w1"]


# --- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("matching", "taught"),
    [
        ({}, barycentric_bins(NEAR_HILL.bins, HILL.bins)),
        ({"ot_epsilon": 60.0, "ot_iters": 7}, barycentric_bins(NEAR_HILL.bins, HILL.bins, 60.0, 7)),
        ({"ot_epsilon": 1e9}, [202, 736] * 4),  # no preference at all: the mean of the five vertices
        ({"ot_epsilon": 0.5, "ot_iters": 1}, barycentric_bins(NEAR_HILL.bins, HILL.bins, 0.5, 1)),
    ],
)
def test_transport_settings_of_a_run_reach_the_rows(tok, matching, taught):
    sections = parse_sections(rollout_aligned(matching=matching))
    settings = RunSettings("stage2_rollout_aligned", sections, {}, Prompt())
    builder = make_builder(settings, SimpleNamespace(tokenizer=tok, max_length=None), layout(tok, 1000))
    backend = WrittenAnswers(tok, [serialize([NEAR_HILL]) + END], policy_version=1)
    roll_out = teacher(tok, backend)
    roll_out._builder = builder
    plan = RolloutPlanner(roll_out, builder, assembly(tok, 1000))([raw(tok, 1, HILL)], 0)
    assert plan.kinds == (ForwardKind.ROLLOUT,)
    assert plan.forwards[0].meta.rows.bins_N.tolist() == taught
