"""Equal to the bit: a run, the same run again while a probe looks on, and a resumed one; and what `--seed` changes.

About 90 s.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.processes import run_fresh_swift, run_swift, sft_flags
from support.stage2 import two_channel

from coordexp.metrics.sinks import read_payloads

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEERED = {
    "kind": "setpoint", "name": "sharper", "effect": "lowers", "target": 0.0, "gain": 100.0, "rate": 0.1, "ema": 0.5,
    "mode": "act",
}  # fmt: skip
WEIGHT = {
    **STEERED, "knob": "coord_soft_ce_w1.w1_weight", "metric": "coord_diag/expected_bin_mae", "bounds": [0.5, 2.0],
    "audit_every": 2,
}  # fmt: skip
SHARE = {
    **STEERED, "knob": "b_ratio", "metric": "loss/A1_text/struct_ce", "bounds": [0.0, 0.6], "audit_every": 0,
}  # fmt: skip
FORWARDS = {
    "kind": "softctx_economy", "name": "forwards", "forced": 1, "observed": 0, "dwell": 0, "audit_every": 2,
    "mode": "act", "price": {"initial": 5.0, "bounds": [4.0, 9.0]},
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "stage1_coord": {
        "custom": {"coord_soft_ce_w1": {"warmup": {"soft_ce_weight": [[0, 0.0], [4, 1.0]]}}},
        "control": {"controllers": [WEIGHT]},
    },
    "stage2_two_channel": {
        **two_channel(0.25, n_softctx_iter=2),
        "control": {"controllers": [SHARE, FORWARDS]},
    },
}
"""With controllers that act, and a checkpoint in the middle of an audit: the second window ends in one."""


def train(
    model: Path,
    scenes: Path,
    output: Path,
    variant: str = "stage1_coord",
    *,
    fresh: bool = False,
    **more: Any,
) -> dict[int, float]:
    """Step -> loss.

    fresh: in a new interpreter, which orders sets in its own way.
    """
    flags = {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2,
        "custom_trainer_variant": variant, "coordexp": json.dumps(VARIANTS[variant]), "val_dataset": None, **more,
    }  # fmt: skip
    start = run_fresh_swift if fresh else run_swift
    done = start("sft", *sft_flags(model, scenes, output, **flags))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = [(p["global_step"], p["metrics"]) for p in read_payloads(output / "metrics.jsonl")]
    return {step: metrics["loss"] for step, metrics in found if "loss" in metrics}


def assert_equal_weights(one: Path, other: Path) -> None:
    left, right = (load_file(run / "checkpoint-4" / "model.safetensors") for run in (one, other))
    assert left.keys() == right.keys()
    assert [name for name in left if not left[name].equal(right[name])] == []


def assert_trajectories(run: Path) -> None:
    """They are in the records of the steps that were asked for, and free minus nudged is the gap."""
    payloads = [(p["global_step"], p["metrics"]) for p in read_payloads(run / "metrics.jsonl")]
    records = {step: metrics for step, metrics in payloads if "loss" in metrics}
    found = {
        step: {key for key in metrics if key.startswith("trajectory/")} for step, metrics in records.items()
    }
    names = ("lior", "R", "speed", "nll")
    expected = {f"trajectory/{of}/{name}_mean" for of in ("free", "nudged", "gap") for name in names}
    assert [found[step] for step in (1, 3)] == [set(), set()]
    assert [found[step] for step in (2, 4)] == [expected | {"trajectory/window_ms"}] * 2
    for step in (2, 4):
        for name in names:
            free, nudged, gap = (
                records[step][f"trajectory/{of}/{name}_mean"] for of in ("free", "nudged", "gap")
            )
            assert gap == pytest.approx(free - nudged, abs=2e-8)  # a record has eight decimals
            assert free > 0


@pytest.fixture(scope="module")
def first(request, taught_model, scenes, tmp_path_factory) -> tuple[str, Path, dict[int, float]]:
    """A run of a variant, with its losses."""
    output = tmp_path_factory.mktemp("equal") / "first"
    return request.param, output, train(taught_model, scenes, output, request.param)


@pytest.mark.parametrize("first", list(VARIANTS), indirect=True)
def test_runs_are_equal_to_the_bit_and_so_is_a_resumed_one(first, taught_model, scenes, tmp_path):
    variant, output, losses = first
    again, resumed = tmp_path / "again", tmp_path / "resumed"
    derived = json.loads((output / "resolved_config.json").read_text())["derived"]
    assert (derived["deterministic"], derived["total_steps"]) == (True, 4)
    probe = {"every_steps": 2, "num_samples": 2, "max_new_tokens": 24}
    probed = json.dumps({**VARIANTS[variant], "telemetry": {"trajectory_probe": probe}})
    val = scenes / "val.jsonl"
    probe_losses = train(taught_model, scenes, again, variant, fresh=True, coordexp=probed, val_dataset=val)
    assert probe_losses == losses
    assert_trajectories(again)
    assert_equal_weights(output, again)
    rest = train(taught_model, scenes, resumed, variant, resume_from_checkpoint=output / "checkpoint-2")
    assert rest == {step: losses[step] for step in (3, 4)}
    assert_equal_weights(output, resumed)
    decisions = [read_decisions(run) for run in (output, again, resumed)]
    assert decisions[0] == decisions[1]
    assert decisions[2] == [one for one in decisions[0] if one["step"] > 2]
    check = {
        "stage1_coord": a_weight_was_steered,
        "stage2_two_channel": self_context_came_down_to_one_forward,
    }
    payloads = read_payloads(output / "metrics.jsonl")
    check[variant](decisions[0], {p["global_step"]: p["metrics"] for p in payloads if "loss" in p["metrics"]})


def read_decisions(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "control.jsonl").read_text().splitlines()]


def a_weight_was_steered(decisions: list[dict[str, Any]], metrics: dict[int, dict[str, float]]) -> None:
    """1, then a tenth more an update (the error is far above the target); the third window is an audit at the base."""
    assert [(one["step"], one["in_force"]) for one in decisions] == [
        (1, pytest.approx(1.1)), (2, 1.0), (3, pytest.approx(1.2)), (4, pytest.approx(1.3))
    ]  # fmt: skip
    assert decisions[2]["labels"][0] == "AUDIT"
    key = "schedule/coord_soft_ce_w1/w1_weight"
    assert [metrics[step][key] for step in (1, 2, 3, 4)] == pytest.approx([1.0, 1.1, 1.0, 1.2])
    assert [metrics[step]["schedule/coord_soft_ce_w1/soft_ce_weight"] for step in (1, 2, 3, 4)] == [
        0,
        0.25,
        0.5,
        0.75,
    ]
    assert metrics[2]["control/sharper/value"] == pytest.approx(1.2)


def self_context_came_down_to_one_forward(
    decisions: list[dict[str, Any]], metrics: dict[int, dict[str, float]]
) -> None:
    """Forced, priced beyond any gain, an audit with both forwards.

    The share of channel B grows: 0.25 + 0.35 + 0.45 is more than 1, so the third step is of it, and no update.
    """
    forwards = [one for one in decisions if one["controller"] == "forwards"]
    assert [(one["step"], one["after"], one["in_force"]) for one in forwards] == [
        (1, 2, 2),
        (2, 1, 2),
        (4, 1, 1),
    ]
    assert forwards[2]["labels"][0] == "AUDIT"
    assert forwards[2]["numbers"]["survival_2"] == 1.0
    assert [metrics[step].get("stage2_ab/softctx_forwards") for step in (1, 2, 3, 4)] == [2, 2, None, 2]
    assert forwards[0]["numbers"]["gain"] == pytest.approx(metrics[1]["stage2_ab/softctx_gain"], abs=1e-7)
    shares = [one["after"] for one in decisions if one["controller"] == "sharper"]
    assert shares == pytest.approx([0.35, 0.45, 0.55])
    assert [metrics[step]["stage2/channel_b"] for step in (1, 2, 3, 4)] == [0, 0, 1, 0]


@pytest.mark.parametrize("first", ["stage1_coord"], indirect=True)
def test_the_seed_chooses_the_order_unless_data_seed_is_given(first, taught_model, scenes, tmp_path):
    _, _, of_42 = first
    runs = {
        name: train(taught_model, scenes, tmp_path / name, save_strategy="no", **flags)
        for name, flags in {"2": {"seed": 2}, "2 of 42": {"seed": 2, "data_seed": 42}}.items()
    }
    assert runs["2"] != of_42 == runs["2 of 42"]
    derived = json.loads((tmp_path / "2" / "resolved_config.json").read_text())["derived"]
    assert derived["data_seed"] == 2
