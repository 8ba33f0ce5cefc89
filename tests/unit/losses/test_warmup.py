"""Warm-up of weights: each step's objective is the one whose configured weights are those of the step."""

from __future__ import annotations

import pytest
import torch
from support.objective import COORD_REG, evaluate, make_batch, make_spec

from coordexp.config.schema.pipeline import Pipeline, pipeline_checksum
from coordexp.errors import ConfigError
from coordexp.losses.modules import ForwardKind, ObjectiveSpec
from coordexp.losses.objective import Stage2Objective
from coordexp.losses.stage1 import Stage1Weights, stage1_loss

RAMP = [[0, 0.0], [200, 1.0]]
KINDS = [ForwardKind.TEACHER_FORCED, ForwardKind.ROLLOUT]


def with_warmup(spec_changes=None, **warmup) -> Stage2Objective:
    """The objective of the tests, with the warm-up of each named module."""
    written = _written(**(spec_changes or {}))
    for entry in written["objective"]:
        entry["warmup"] = warmup.get(entry["name"], {})
    return Stage2Objective(ObjectiveSpec.from_pipeline(Pipeline.model_validate(written)))


def _written(scales=None, **configs):
    spec = make_spec(**configs)
    objective = [
        {
            "name": entry.name, "enabled": True, "weight": (scales or {}).get(entry.name, entry.weight),
            "channels": list(entry.channels), "config": dict(vars(entry.config)),
        }
        for entry in spec.objective
    ]  # fmt: skip
    diag = {"name": "coord_diag", "enabled": True, "weight": 1.0, "channels": ["A", "B"], "config": {}}
    return {"objective": objective, "diagnostics": [diag]}


def test_weights_at_a_step_by_hand() -> None:
    """w1 comes in over 200 steps, ce goes out by step 100 and stays at a half."""
    weights = Stage1Weights.from_mapping(
        {
            "w1_weight": 3.0,
            "ce_weight": 0.4,
            "warmup": {"w1_weight": RAMP, "ce_weight": [[0, 1.0], [100, 0.5]]},
        }
    )
    at_50 = weights.at(50)
    assert (at_50.w1_weight, at_50.ce_weight, at_50.soft_ce_weight) == (0.75, pytest.approx(0.3), 1.0)
    assert weights.in_force(50) == {"w1_weight": 0.75, "ce_weight": pytest.approx(0.3)}
    assert (weights.settled().w1_weight, weights.settled().ce_weight) == (3.0, 0.2)
    assert weights.at(0).of("w1") == 0.0
    steered = weights.at(50, {"coord_soft_ce_w1.w1_weight": 2.0})
    assert steered.w1_weight == 0.5  # the controller's weight, still warming up
    assert Stage1Weights().in_force(50) == {}


def test_the_stage_1_loss_of_a_step_is_that_of_its_weights() -> None:
    g = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(1, 6, 1060, generator=g), torch.tensor([[-100, 3, 140, 700, 5, 6]])
    warming = Stage1Weights.from_mapping({"w1_weight": 3.0, "warmup": {"w1_weight": RAMP}})
    now, fixed = (
        stage1_loss(logits, labels, range(40, 1040), w)[0] for w in (warming.at(50), {"w1_weight": 0.75})
    )
    assert now == fixed


@pytest.mark.parametrize("kind", KINDS)
def test_the_stage_2_loss_of_a_step_is_that_of_its_weights(kind: ForwardKind) -> None:
    """Of a module as a whole, of single weights, and of a text weight that its denominator depends on."""
    warming = with_warmup(
        token_ce={"desc_ce_weight": RAMP, "rollout_fn_desc_weight": RAMP},
        bbox_geo={"weight": RAMP, "ciou_weight": [[0, 2.0]]},
        coord_reg={"coord_el1_weight": [[0, 1.0], [100, 0.0]], "text_gate_weight": RAMP},
    )
    fixed = Stage2Objective(
        ObjectiveSpec.from_pipeline(
            Pipeline.model_validate(
                _written(
                    scales={"bbox_geo": 1.2 * 0.25},
                    token_ce={"desc_ce_weight": 0.7 * 0.25, "rollout_fn_desc_weight": 0.4 * 0.25},
                    bbox_geo={"ciou_weight": 1.6},
                    coord_reg={
                        "coord_el1_weight": COORD_REG["coord_el1_weight"] * 0.5,
                        "text_gate_weight": COORD_REG["text_gate_weight"] * 0.25,
                    },
                )
            )
        )
    )
    logits, rows = make_batch(rollout=kind is ForwardKind.ROLLOUT)
    (now, terms), (expected, _) = (evaluate(one, logits, rows, kind) for one in (warming.at(50), fixed))
    assert now.item() == pytest.approx(expected.item(), rel=1e-6)
    shares = warming.at(50).shares(terms, warming.at(50).counts(rows, kind))
    assert sum(share.item() for share in shares.values()) == pytest.approx(now.item(), rel=1e-5)


def test_a_module_that_has_not_come_in_emits_no_atom_but_still_says_the_temperature() -> None:
    """Boxes are decoded at its temperature all the same, and the text gate acts on the rows that it will act on."""
    logits, rows = make_batch()
    kind = ForwardKind.ROLLOUT
    warming = with_warmup(coord_reg={"weight": RAMP})
    _, terms = evaluate(warming.at(0), logits, rows, kind)
    assert not any("coord_soft_ce" in key or "coord_w1" in key for key in terms.atoms)
    assert warming.at(0).needs(kind).temperature == COORD_REG["temperature"]
    box = "loss/B_coord/bbox_ciou"
    torch.testing.assert_close(
        terms.atoms[box].sum, evaluate(warming.at(200), logits, rows, kind)[1].atoms[box].sum
    )
    silent = with_warmup(token_ce={"weight": RAMP})
    _, early = evaluate(silent.at(0), logits, rows, kind)
    assert not any(key.startswith("loss/B_rollout_text") for key in early.atoms)
    gate = "loss/B_coord/text_gate"
    assert early.atoms[gate].sum == evaluate(silent.at(200), logits, rows, kind)[1].atoms[gate].sum
    assert early.atoms[gate].sum > 0


def test_what_is_in_force_is_told_by_module_and_name() -> None:
    objective = with_warmup(
        {"coord_reg": {"target_sigma": [[0, 9.0], [10, 4.0]]}}, coord_reg={"weight": RAMP, "w1_weight": RAMP}
    )
    assert objective.spec.in_force(100, {"bbox_geo.ciou_weight": 0.3}) == {
        ("coord_reg", "weight"): pytest.approx(1.3 * 0.5),
        ("coord_reg", "w1_weight"): pytest.approx(0.9 * 0.5),
        ("coord_reg", "target_sigma"): 4.0,
        ("bbox_geo", "ciou_weight"): 0.3,
    }
    assert make_spec().in_force(100) == {}


def test_a_pipeline_without_warm_up_is_the_same_experiment_as_before() -> None:
    plain, empty = _written(), _written()
    for entry in empty["objective"]:
        entry["warmup"] = {}
    warming = _written()
    warming["objective"][2]["warmup"] = {"w1_weight": RAMP}
    sums = [pipeline_checksum(Pipeline.model_validate(one), {}) for one in (plain, empty, warming)]
    assert sums[0] == sums[1] != sums[2]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"warmup": {"w2_weight": RAMP}}, r"warmup\.w2_weight: there is no such weight here; expected one of soft_ce"),
        ({"warmup": {"gate_weight": RAMP}}, r"warmup\.gate_weight cannot take effect: gate_weight is 0"),
        ({"warmup": {"w1_weight": 0.5}}, r"w1_weight: expected points \[\[step, number\], \.\.\.\], each number"),
        ({"warmup": {"w1_weight": [[0, -1]]}}, r"the number of \[0, -1\] is -1; expected a number from 0"),
        ({"warmup": RAMP}, r"expected a mapping of weights to points"),
        ({"enabled": False, "warmup": {"w1_weight": RAMP}}, r"cannot take effect with enabled: false"),
    ],
)  # fmt: skip
def test_a_warm_up_without_effect_is_refused(settings, told) -> None:
    with pytest.raises(ConfigError, match=told):
        Stage1Weights.from_mapping(settings)


def test_so_is_one_in_a_module_list() -> None:
    with pytest.raises(ValueError, match=r"warmup\.coord_huber_delta: there is no such weight here"):
        with_warmup(coord_reg={"coord_huber_delta": RAMP})
