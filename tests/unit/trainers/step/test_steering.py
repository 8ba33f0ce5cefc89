"""Controllers between a trainer and its files: knobs, records, tags, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.stage2 import two_channel

from coordexp.config import parse_sections
from coordexp.errors import ConfigError
from coordexp.metrics.catalog import check_known
from coordexp.metrics.keys_control import SOFTCTX_ENTROPY_CHANGE, SOFTCTX_FORWARDS, SOFTCTX_GAIN
from coordexp.trainers.step.steering import Steering

METRIC = "coord_diag/expected_bin_mae"
KNOB = "coord_soft_ce_w1.w1_weight"
CONTROLLER: dict[str, Any] = {
    "kind": "setpoint", "name": "sharper", "knob": KNOB, "metric": METRIC, "target": 10.0, "effect": "lowers",
    "gain": 0.1, "bounds": [0.5, 2.0], "rate": 0.2, "ema": 0.0, "audit_every": 2, "mode": "act",
}  # fmt: skip


def steering(run_dir: Path, *, is_main: bool = True, dry_run: str | None = None, **changes: Any) -> Steering:
    written = {"custom": {"dry_run": dry_run}, "control": {"controllers": [{**CONTROLLER, **changes}]}}
    return Steering("stage1_coord", parse_sections(written), run_dir, is_main)


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "control.jsonl").read_text().splitlines()]


def test_decisions_are_recorded_told_in_the_metrics_and_in_force_for_the_next_steps(tmp_path: Path) -> None:
    steered = steering(tmp_path)
    assert steered.knobs() == {KNOB: 1.0}
    numbers = steered.observed(5, {METRIC: 11.0, "loss/A1_text/desc_ce": 3.0})
    check_known(numbers, strict=True)
    assert steered.knobs() == {KNOB: 1.1}
    assert numbers["control/sharper/value"] == numbers["control/sharper/in_force"] == 1.1
    assert steered.tags() == {}
    steered.observed(10, {METRIC: 11.0})
    assert steered.knobs() == {KNOB: 1.0}  # an audit
    audit = steered.observed(15, {METRIC: 12.0})
    assert audit["control/sharper/bought"] == pytest.approx(1.0)
    assert steered.tags() == {"control/sharper/value": "[AUDIT][WIN]"}
    found = records(tmp_path)
    assert [(row["step"], row["before"], row["after"]) for row in found] == [
        (5, 1.0, 1.1), (10, 1.1, pytest.approx(1.2)), (15, pytest.approx(1.2), pytest.approx(1.2))
    ]  # fmt: skip
    assert found[0]["reason"] == f"{METRIC} is 1 above its target"
    assert found[2]["labels"] == ["AUDIT", "WIN"]


def test_a_resumed_run_forgets_the_decisions_behind_its_checkpoint(tmp_path: Path) -> None:
    first = steering(tmp_path)
    first.observed(5, {METRIC: 11.0})
    first.observed(10, {METRIC: 11.0})
    kept = {"args": {}, "attributes": json.loads(json.dumps(first.state()))}
    expected = first.observed(15, {METRIC: 12.0}), first.knobs()
    whole = records(tmp_path)
    second = steering(tmp_path)
    second.restore(kept, 10)
    assert [row["step"] for row in records(tmp_path)] == [5, 10]
    assert (second.observed(15, {METRIC: 12.0}), second.knobs()) == expected
    assert records(tmp_path) == whole


def test_a_run_that_begins_anew_forgets_the_decisions_of_an_earlier_one(tmp_path: Path) -> None:
    steering(tmp_path).observed(5, {METRIC: 11.0})
    anew = steering(tmp_path)
    anew.restore(None, 0)
    assert records(tmp_path) == []
    assert anew.knobs() == {KNOB: 1.0}
    anew.observed(5, {METRIC: 9.0})
    assert [row["after"] for row in records(tmp_path)] == [0.9]


def test_other_ranks_decide_the_same_and_write_nothing(tmp_path: Path) -> None:
    main, other = steering(tmp_path / "a"), steering(tmp_path / "b", is_main=False)
    (tmp_path / "a").mkdir()
    for step, value in enumerate((11.0, 14.0, 9.0, 8.0, 12.5)):
        assert main.observed(step, {METRIC: value}) == other.observed(step, {METRIC: value})
        assert main.knobs() == other.knobs()
    assert not (tmp_path / "b").exists()


def test_nothing_is_steered_without_controllers_or_in_a_dry_run(tmp_path: Path) -> None:
    plain = Steering("stage1_coord", parse_sections({}), tmp_path, True)
    for steered in (plain, steering(tmp_path, dry_run="step")):
        assert steered.observed(1, {METRIC: 50.0}) == {}
        assert (steered.knobs(), steered.state(), steered.tags()) == ({}, {}, {})
    assert not (tmp_path / "control.jsonl").exists()


def test_what_self_context_brought_is_read_from_the_window(tmp_path: Path) -> None:
    economy = {"kind": "softctx_economy", "name": "forwards", "forced": 1, "mode": "act"}
    sections = parse_sections({**two_channel(0.5, n_softctx_iter=3), "control": {"controllers": [economy]}})
    steered = Steering("stage2_two_channel", sections, tmp_path, True)
    assert steered.measures_forwards
    assert steered.knobs() == {"n_softctx_iter": 3.0}
    assert steered.observed(1, {"stage2/channel_b": 1.0}) == {}
    numbers = steered.observed(2, {SOFTCTX_FORWARDS: 3.0, SOFTCTX_GAIN: 0.5, SOFTCTX_ENTROPY_CHANGE: -0.1})
    check_known(numbers, strict=True)
    assert (numbers["control/forwards/gain"], numbers["control/forwards/survival_3"]) == (0.5, 1.0)
    assert steered.tags() == {"control/forwards/value": "[WIN][CONFIDENCE+]"}


def test_a_checkpoint_of_other_controllers(tmp_path: Path) -> None:
    """Bounds that have changed hold at once; the name of another kind of controller is refused."""
    first = steering(tmp_path)
    first.observed(5, {METRIC: 20.0})
    assert first.knobs() == {KNOB: 1.2}
    kept = {"attributes": first.state()}
    narrower = steering(tmp_path, bounds=[0.5, 1.1])
    narrower.restore(kept, 5)
    assert narrower.knobs() == {KNOB: 1.1}
    economy = {"kind": "softctx_economy", "name": "sharper", "mode": "act"}

    def forwards(number: int) -> Steering:
        written = two_channel(0.5, n_softctx_iter=number) | {"control": {"controllers": [economy]}}
        return Steering("stage2_two_channel", parse_sections(written), tmp_path, False)

    with pytest.raises(
        ConfigError, match="sharper is of kind softctx_economy, but in the resumed checkpoint"
    ):
        forwards(3).restore(kept, 5)
    fewer = forwards(2)
    fewer.restore({"attributes": forwards(3).state()}, 5)
    assert fewer.knobs() == {"n_softctx_iter": 2.0}
