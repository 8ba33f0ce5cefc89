"""Whole stage-2 steps without an HF Trainer: planned, run on a nano Qwen3-VL, and checked against plain formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.stage1_head import load
from support.stage2 import BBOX_GEO, COORD_REG, PIPELINE, TOKEN_CE, objective_spec
from support.steps import WrittenAnswers, assembly, box, objective, raw, teacher
from transformers import AutoTokenizer

from coordexp.codec.forms.choose import form_of
from coordexp.codec.serialize import serialize
from coordexp.codec.token_types import TokenType
from coordexp.control.controllers.share import AccumulatedShare
from coordexp.control.schedule import Channel
from coordexp.head.run import RowsHead
from coordexp.losses.columns import CoordColumns
from coordexp.losses.modules import ForwardKind
from coordexp.losses.objective import Stage2Objective
from coordexp.models.self_context import SelfContext
from coordexp.targets.builder import TargetBuilder
from coordexp.targets.roles import TokenRole
from coordexp.trainers.step.assembly import StepAssembly
from coordexp.trainers.step.planners import GroundTruthPlanner, RolloutPlanner, ScheduledPlanner
from coordexp.trainers.step.runner import PlainRunner, SelfContextRunner

CAT, DOG = box("cat", 100, 100, 300, 300), box("dog", 500, 500, 800, 800)
END = "<|im_end|>"


@pytest.fixture(scope="module")
def tok(nano):
    return AutoTokenizer.from_pretrained(nano)


@pytest.fixture
def model(nano):
    return load(nano)


def rollout_planner(tok, packing_length, answers, version=1):
    backend = WrittenAnswers(tok, answers, version)
    builder = TargetBuilder(tok)
    return RolloutPlanner(teacher(tok, backend), builder, assembly(tok, packing_length))


def plain_runner(tok, **options):
    assemble = assembly(tok, None)
    columns = assemble.layout.columns
    return PlainRunner(RowsHead("plain", columns), objective(), columns, checks_atoms=True, **options)


def run_step(model, runner, plan):
    """Loss of the step and its gradient, as a trainer would add them up."""
    model.zero_grad()
    loss, metrics = 0.0, []
    for forward in plan.counted:
        outcome = runner(model, model, forward.on(torch.device("cpu"), forward.inputs), plan)
        outcome.loss.backward()
        loss += float(outcome.loss.detach())
        metrics.append(outcome.metrics)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return loss, gradient, metrics


def text_loss_by_hand(model, samples, coord_weight=0.0):
    """token_ce of channel A or B, sample by sample, from the model's logits in float64.

    coord_weight: of coordinates of missed objects, where they are numbers.
    """
    weight_of = {
        (TokenRole.MATCHED_PREFIX, TokenType.STRUCT): TOKEN_CE["rollout_matched_prefix_struct_weight"],
        (TokenRole.FN_TAIL, TokenType.STRUCT): 1.0,
        (TokenRole.FN_TAIL, TokenType.DESC): TOKEN_CE["rollout_fn_desc_weight"],
        (TokenRole.CLOSURE, TokenType.STRUCT): 1.0,
        (TokenRole.EOS, TokenType.EOS): 1.0,
        (TokenRole.FN_TAIL, TokenType.COORD): coord_weight,
        (TokenRole.GROUND_TRUTH, TokenType.STRUCT): 1.0,
        (TokenRole.GROUND_TRUTH, TokenType.DESC): TOKEN_CE["desc_ce_weight"],
        (TokenRole.GROUND_TRUTH, TokenType.COORD): coord_weight,
    }
    total = weights = 0.0
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids_T.copy())
        with torch.no_grad():
            logits_TV = model(input_ids=ids[None]).logits[0].double()
        ce_T = torch.nn.functional.cross_entropy(logits_TV[:-1], ids[1:], reduction="none")
        for t in range(1, len(ids)):
            weight = weight_of.get((TokenRole(sample.roles_T[t]), TokenType(sample.types_T[t])), 0.0)
            total, weights = total + weight * float(ce_T[t - 1]), weights + weight
    return total / weights


def test_a_rollout_step_is_planned_run_and_checked(tok, model):
    raws = [raw(tok, 1, CAT, DOG), raw(tok, 2, DOG)]
    answers = [serialize([CAT]) + END, serialize([CAT, DOG]) + END]
    plan = rollout_planner(tok, 400, answers)(raws, 0)
    assert (plan.channel, plan.kinds, plan.step) == (Channel.B, (ForwardKind.ROLLOUT,), 0)
    texts = [sample.target_text for sample in plan.rolled_out.samples]
    assert texts == [serialize([CAT, DOG]) + END, serialize([CAT, DOG]) + END]
    assert float(plan.totals["B_coord/boxes"]) == 2 + 1  # matched and missed; the second cat is neither
    loss, _, (metrics,) = run_step(model, plain_runner(tok), plan)
    atoms = {key: atom for key, atom in metrics.items() if key.startswith("loss/")}
    text = sum(float(atoms[f"loss/B_rollout_text/{name}"].sum) for name in ("struct_ce", "desc_ce"))
    expected = text_loss_by_hand(model, plan.rolled_out.samples)
    assert text / float(plan.totals["B_rollout_text"]) == pytest.approx(expected, rel=1e-5)
    coordinate = {key for key in atoms if key.startswith("loss/B_coord/")}
    assert len(coordinate) == len(BBOX_GEO) + len([key for key in COORD_REG if key.endswith("_weight")]) - 1
    assert loss == pytest.approx(
        sum(float(share) for share in objective_shares(metrics, plan).values()), rel=1e-5
    )


@pytest.mark.parametrize("head", ["plain", "fused"])
def test_a_rollout_step_on_answers_that_write_numbers(tok, model, head):
    """No coordinate columns: the numbers of missed objects are taught as text, those of the rollout are not."""
    form, columns = form_of("qwen"), CoordColumns(())
    only_text = Stage2Objective(objective_spec(PIPELINE["objective"][:1]))
    assemble = replace(assembly(tok, None).layout, columns=columns)
    assembled = StepAssembly(
        assemble, only_text, agree=int, add_up=lambda counts: counts, device=torch.device("cpu")
    )
    backend = WrittenAnswers(tok, [form.serialize([CAT]) + END])
    planner = RolloutPlanner(teacher(tok, backend, form=form), TargetBuilder(tok, form=form), assembled)
    plan = planner([raw(tok, 1, CAT, DOG)], 0)
    (sample,) = plan.rolled_out.samples
    assert sample.target_text == form.serialize([CAT, DOG]) + END
    runner = PlainRunner(RowsHead(head, columns), only_text, columns, checks_atoms=True)
    loss, gradient, (metrics,) = run_step(model, runner, plan)
    assert loss == pytest.approx(text_loss_by_hand(model, [sample], coord_weight=1.0), rel=1e-5)
    assert {key for key in metrics if key.startswith("loss/")} == {
        "loss/B_rollout_text/struct_ce", "loss/B_rollout_text/desc_ce",
    }  # fmt: skip
    assert float(gradient.norm()) > 0
    builder = TargetBuilder(tok, form=form)
    plan = GroundTruthPlanner(builder, assembled, num_forwards=1)([raw(tok, 1, CAT, DOG)], 0)
    prompt_ids = raw(tok, 1).prompt_ids
    taught = builder.from_ground_truth(prompt_ids, [CAT, DOG], sample_id="data.jsonl:1")
    loss, _, _ = run_step(model, runner, plan)
    assert loss == pytest.approx(text_loss_by_hand(model, [taught], coord_weight=1.0), rel=1e-5)


def objective_shares(metrics, plan):
    """Each atom over its denominator, by the names of the totals."""
    boxes, slots, gated = (plan.totals[f"B_coord/{name}"] for name in ("boxes", "slots", "text_gate"))
    shares = {}
    for key, atom in metrics.items():
        if key.startswith("loss/B_rollout_text/"):
            shares[key] = atom.sum / plan.totals["B_rollout_text"]
        elif key.startswith("loss/"):
            special = {"bbox_ciou": boxes, "bbox_smoothl1": 4 * boxes, "text_gate": gated}
            over = special.get(key.split("/")[-1], slots)
            shares[key] = atom.sum / over
    return shares


@pytest.mark.parametrize("packing_length", [None, 150, 400])
def test_the_cut_into_forwards_changes_neither_loss_nor_gradient(tok, model, packing_length):
    raws = [raw(tok, 1, CAT, DOG), raw(tok, 2, DOG), raw(tok, 3, CAT)]
    answers = [serialize([CAT]) + END, "no idea" + END, serialize([DOG])]
    whole = rollout_planner(tok, 1000, answers)(raws, 0)
    cut = rollout_planner(tok, packing_length, answers)(raws, 0)
    assert len(whole.forwards) == 1
    assert len(cut.forwards) == {None: 2, 150: 2, 400: 1}[packing_length]
    loss, gradient, _ = run_step(model, plain_runner(tok), whole)
    loss_cut, gradient_cut, _ = run_step(model, plain_runner(tok), cut)
    assert loss_cut == pytest.approx(loss, rel=1e-5)
    assert float((gradient - gradient_cut).norm() / gradient.norm()) < 1e-5


def test_a_schedule_picks_the_planner_by_the_step_alone(tok):
    raws, builder, assemble = [raw(tok, 1, CAT)], TargetBuilder(tok), assembly(tok, None)
    planner = ScheduledPlanner(
        0.5,
        GroundTruthPlanner(builder, assemble, num_forwards=2),
        rollout_planner(tok, None, [serialize([CAT]) + END] * 3, version=2),
    )
    plans = [planner(raws, step) for step in (0, 1, 2)]
    assert [plan.channel for plan in plans] == [Channel.A, Channel.B, Channel.A]
    assert plans[0].kinds == (ForwardKind.ANCHOR, ForwardKind.SELF_CONTEXT)
    assert [plan.facts["stage2/channel_b"] for plan in plans] == [0.0, 1.0, 0.0]
    assert [plan.rolled_out is None for plan in plans] == [True, False, True]
    again = planner(raws, 0)
    assert again.totals == plans[0].totals


def test_self_context_takes_text_from_the_first_forward_and_coordinates_from_the_last(tok, model):
    raws, builder, assemble = [raw(tok, 1, CAT, DOG)], TargetBuilder(tok), assembly(tok, None)
    once = GroundTruthPlanner(builder, assemble)(raws, 0)
    twice = GroundTruthPlanner(builder, assemble, num_forwards=2)(raws, 0)
    plain = plain_runner(tok)
    _, _, (alone,) = run_step(model, plain, once)
    chained = SelfContextRunner(plain, SelfContext(num_forwards=2))
    _, _, (both,) = run_step(model, chained, twice)
    name = "loss/A1_text/struct_ce"
    assert float(both[name].sum) == pytest.approx(float(alone[name].sum), rel=1e-5)
    assert float(both["loss/A2_coord/coord_w1"].sum) != pytest.approx(
        float(alone["loss/A2_coord/coord_w1"].sum), rel=1e-5
    )
    _, _, (same,) = run_step(model, chained, once)  # a step of one kind runs as one forward
    assert float(same["loss/A2_coord/coord_w1"].sum) == pytest.approx(
        float(alone["loss/A2_coord/coord_w1"].sum), rel=1e-6
    )


def test_a_share_that_a_controller_moves_is_added_up_from_step_to_step(tok):
    """0.25 + 0.5 + 0.5 passes 1 at the third step; without the knob the step's number alone decides."""
    raws, builder, assemble = [raw(tok, 1, CAT)], TargetBuilder(tok), assembly(tok, None)
    rollouts = rollout_planner(tok, None, [serialize([CAT]) + END] * 3, version=3)
    planner = ScheduledPlanner(0.25, GroundTruthPlanner(builder, assemble), rollouts, AccumulatedShare())
    plans = [planner(raws, step, {"b_ratio": ratio}) for step, ratio in enumerate((0.25, 0.5, 0.5))]
    assert [plan.channel for plan in plans] == [Channel.A, Channel.A, Channel.B]
    assert plans[2].facts["stage2_ab/b_ratio_realized"] == pytest.approx(1 / 3)
    assert planner(raws, 0).channel is Channel.A


def test_a_step_runs_the_forwards_and_weights_that_controllers_have_in_force(tok, model):
    raws, assemble = [raw(tok, 1, CAT, DOG)], assembly(tok, None)
    planner = GroundTruthPlanner(TargetBuilder(tok), assemble, num_forwards=2)
    measured = SelfContextRunner(plain_runner(tok), SelfContext(num_forwards=2), measures=True)
    found = {}
    for number in (1, 2, 3):
        plan = planner(raws, 0, {"n_softctx_iter": float(number), "coord_reg.w1_weight": 0.5})
        assert plan.facts["schedule/coord_reg/w1_weight"] == 0.5
        _, _, (found[number],) = run_step(model, measured, plan)
    name = "loss/A2_coord/coord_w1"
    fixed = {
        number: run_step(
            model, SelfContextRunner(plain_runner(tok), SelfContext(num_forwards=number)), planner(raws, 0)
        )[2][0]
        for number in (2, 3)
    }
    for number in (2, 3):
        whole = float(fixed[number][name].sum)
        assert float(found[number][name].sum) == pytest.approx(0.5 / COORD_REG["w1_weight"] * whole, rel=1e-5)
        assert float(found[number]["stage2_ab/softctx_forwards"].sum) == number
        key = "loss/A2_coord/coord_token_ce"
        gain = (
            float((found[1][key].sum - found[number][key].sum) / found[1][key].count)
            / COORD_REG["coord_ce_weight"]
        )
        worth = found[number]["stage2_ab/softctx_gain"]
        assert float(worth.sum / worth.count) == pytest.approx(gain, abs=1e-4)
        change = found[number]["stage2_ab/softctx_entropy_change"]
        entropy = "loss/A2_coord/coord_entropy"
        grown = float((found[number][entropy].sum - found[1][entropy].sum) / found[1][entropy].count)
        assert float(change.sum / change.count) == pytest.approx(
            grown / COORD_REG["coord_entropy_weight"], abs=1e-3
        )
    assert "stage2_ab/softctx_gain" not in found[1]
    assert "stage2_ab/softctx_forwards" not in fixed[2]
