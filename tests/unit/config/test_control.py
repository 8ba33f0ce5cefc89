"""Controllers that could not act are refused with the key and what to do."""

from __future__ import annotations

from typing import Any

import pytest
from support.stage2 import two_channel

from coordexp.config import parse_sections
from coordexp.config.contradictions.controllers import control_problems, knob_values
from coordexp.errors import ConfigError
from coordexp.metrics.best import steered_metric_problems

TARGET: dict[str, Any] = {
    "kind": "setpoint", "name": "sharper", "knob": "coord_reg.w1_weight", "metric": "coord_diag/B/expected_bin_mae",
    "target": 10.0, "effect": "lowers", "gain": 0.1, "bounds": [0.5, 2.0], "rate": 0.1,
}  # fmt: skip
ECONOMY: dict[str, Any] = {"kind": "softctx_economy", "name": "forwards", "mode": "act"}
EVERY_STEP = {"logging_steps": 1}


def problems(
    *controllers: dict[str, Any], swift: dict[str, Any] | None = None, b_ratio: Any = 0.5, forwards: int = 2
) -> dict[str, str]:
    """Last part of the key -> what is said."""
    written = {**two_channel(b_ratio, n_softctx_iter=forwards), "control": {"controllers": list(controllers)}}
    sections = parse_sections(written)
    found = control_problems("stage2_two_channel", sections, EVERY_STEP if swift is None else swift)
    return {str(path[-1]): text for path, text in found}


def test_controllers_of_every_knob_are_taken() -> None:
    share = {**TARGET, "name": "share", "knob": "b_ratio", "bounds": [0, 1]}
    module = {**TARGET, "name": "module", "knob": "bbox_geo.weight", "mode": "act"}
    assert problems(TARGET, share, module, ECONOMY) == {}
    values = knob_values("stage1_coord", parse_sections({}))
    assert values == {
        "coord_soft_ce_w1.soft_ce_weight": 1.0, "coord_soft_ce_w1.w1_weight": 1.0, "coord_soft_ce_w1.ce_weight": 0.0,
        "coord_soft_ce_w1.gate_weight": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "options", "key", "told"),
    [
        ({"knob": "coord_reg.w2_weight"}, {}, "knob", "no such knob. Did you mean coord_reg.w1_weight?"),
        ({"knob": "coord_soft_ce_w1.w1_weight"}, {}, "knob", "this run has no such knob"),
        ({"knob": "n_softctx_iter"}, {}, "kind", "priced by a controller of kind softctx_economy"),
        ({"knob": "b_ratio", "bounds": [0, 2]}, {}, "bounds", "its upper bound is 2, expected 1 at most"),
        (
            {"knob": "b_ratio"},
            {"b_ratio": [[0, 0.0], [9, 0.5]]},
            "knob",
            "has points, which say its value already",
        ),
        ({"bounds": [1.5, 2.0]}, {}, "bounds", "the configured coord_reg.w1_weight is 1, outside [1.5, 2.0]"),
        (
            {"mode": "act"},
            {"swift": {"logging_steps": 5, "save_strategy": "steps", "save_steps": 12}},
            "controllers",
            "make save_steps a multiple of logging_steps",
        ),
        (  # as `swift sft` hands them over
            {"mode": "act"},
            {"swift": {"logging_steps": 5, "save_strategy": "steps", "save_steps": 12.0}},
            "controllers",
            "save_steps 12; make save_steps a multiple of logging_steps",
        ),
        (  # an evaluation that nothing is said of goes with the saves, and its best checkpoint is saved
            {"mode": "act"},
            {"swift": {"logging_steps": 5, "save_strategy": "steps", "save_steps": 10, "eval_steps": 7.0}},
            "controllers",
            "eval_steps 7; make eval_steps a multiple of logging_steps",
        ),
        (
            {"mode": "act"},
            {"swift": {"logging_steps": 5, "save_strategy": "epoch"}},
            "controllers",
            "save_strategy is epoch",
        ),
        ({"mode": "act"}, {"swift": {}}, "controllers", "needs logging_steps, in whole steps"),
        (
            {"mode": "act"},
            {"swift": {"logging_steps": 7}},
            "controllers",
            "save_strategy is steps and save_steps 500",
        ),
        (
            {"mode": "act"},
            {"swift": {"logging_steps": 1, "logging_strategy": "epoch"}},
            "controllers",
            "logging_strategy is epoch; set it to steps",
        ),
    ],
)
def test_a_controller_without_effect_is_refused(
    changes: dict[str, Any], options: dict[str, Any], key: str, told: str
) -> None:
    found = problems({**TARGET, **changes}, **options)
    assert found.keys() == {key}
    assert told in found[key]


def test_windows_that_end_where_checkpoints_are_made_are_taken() -> None:
    swift = {
        "logging_steps": 5,
        "save_strategy": "steps",
        "save_steps": 20.0,
        "eval_strategy": "no",
        "eval_steps": 7,
    }
    assert problems({**TARGET, "mode": "act"}, swift=swift) == {}


def test_a_rule_that_ends_the_run_between_two_decisions_is_refused() -> None:
    controllers = {"controllers": [{**TARGET, "mode": "act"}]}
    written = {**two_channel(0.5), "control": controllers, "telemetry": {"stop_on": ["oom_retries"]}}
    sections = parse_sections(written)

    def told(every: int) -> list[tuple[Any, ...]]:
        return [
            path for path, _ in control_problems("stage2_two_channel", sections, {"logging_steps": every})
        ]

    assert told(5) == [("telemetry", "stop_on")]
    assert told(1) == []


def test_one_forward_has_no_price() -> None:
    assert "there is no forward to price" in problems(ECONOMY, forwards=1)["knob"]
    assert "no step runs channel A" in problems(ECONOMY, b_ratio=1.0)["knob"]


@pytest.mark.parametrize(
    ("controllers", "told"),
    [
        ([TARGET, {**TARGET, "knob": "b_ratio"}], "two controllers have the name sharper"),
        ([TARGET, {**TARGET, "name": "other"}], "two controllers have the knob coord_reg.w1_weight"),
        ([{**TARGET, "bounds": [2, 1]}], r"bounds are \[2\.0, 1\.0\]; expected \[least, most\]"),
        ([{**TARGET, "rate": 0}], r"control\.controllers\[0\]\.rate = 0"),
        ([{**ECONOMY, "price": {"initial": 9}}], "around the initial price 9"),
        ([{**TARGET, "spped": 1}], r"control\.controllers\[0\]\.spped"),
    ],
)
def test_what_the_schema_does_not_take(controllers: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_sections({"control": {"controllers": controllers}})


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        ("coord_diag/B/expected_bin_mea", "did you mean coord_diag/B/expected_bin_mae?"),
        ("loss/coord_tail", "was replaced by the coordinate atoms"),
        ("eval_rollout/f1", "is a number of evaluation"),
        ("schedule/coord_reg/w1_weight", "is decided by controllers and schedules"),
        ("loss", "not reduced over ranks here"),
        ("grad_norm", "not reduced over ranks here"),
    ],
)
def test_a_metric_that_cannot_be_steered_is_refused(metric: str, told: str) -> None:
    sections = parse_sections({"control": {"controllers": [{**TARGET, "metric": metric}, ECONOMY]}})
    (problem,) = steered_metric_problems("stage2_two_channel", sections, {}, lambda name: (name, None))
    assert problem.path == "control.controllers[0].metric"
    assert told in problem.text
