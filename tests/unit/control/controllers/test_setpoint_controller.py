"""A controller on a simulated plant: the metric follows the knob along a line, with a lag and noise."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.config.schema.training import SetpointController
from coordexp.control.controllers.decisions import AUDIT, DEADBAND, TAX_ONLY, WIN, Decision
from coordexp.control.controllers.setpoint import SetpointSteering

METRIC = "coord_diag/loss"


def controller(**changes: Any) -> SetpointController:
    written = {
        "kind": "setpoint", "name": "sharper", "knob": "coord_reg.w1_weight", "metric": METRIC, "target": 10.0,
        "effect": "lowers", "gain": 0.1, "ema": 0.0, "deadband": 0.5, "bounds": [0.0, 4.0], "rate": 0.1,
        "audit_every": 0, "mode": "act", **changes,
    }  # fmt: skip
    return SetpointController.model_validate(written)


class Plant:
    """The metric is `level - slope * knob`, approached by `1 - lag` a window, with noise of at most `noise`."""

    def __init__(
        self, level: float, slope: float, lag: float = 0.0, noise: float = 0.0, seed: int = 0
    ) -> None:
        self.level, self.slope, self.lag, self.noise = level, slope, lag, noise
        self._random, self._at = random.Random(seed), level

    def run(self, knob: float) -> dict[str, float]:
        self._at = self.lag * self._at + (1 - self.lag) * (self.level - self.slope * knob)
        return {METRIC: self._at + self._random.uniform(-self.noise, self.noise)}


def decide(steering: SetpointSteering, plant: Plant, number: int) -> list[Decision]:
    found = [steering.observe(plant.run(steering.in_force)) for _ in range(number)]
    return [decision for decision in found if decision is not None]


@settings(max_examples=40, deadline=None)
@given(knob=st.floats(0.3, 3.7), slope=st.floats(1.0, 8.0), rate=st.floats(0.05, 0.5))
def test_it_reaches_the_target_within_its_rate_and_holds(knob: float, slope: float, rate: float) -> None:
    """From base 2 to the knob that meets the target: as fast as the rate allows, then in the deadband for good."""
    rules = controller(rate=rate, gain=1.0 / slope)
    steering, plant = SetpointSteering(rules, 2.0), Plant(10.0 + slope * knob, slope)
    first = decide(steering, plant, math.ceil(abs(knob - 2.0) / rate) + 2)
    assert all(abs(one.after - one.before) <= rate + 1e-12 for one in first)
    assert abs(plant.run(steering.in_force)[METRIC] - 10.0) <= rules.deadband + 1e-9
    held = decide(steering, plant, 200)
    assert all(abs(one.numbers["error"]) <= rules.deadband + 1e-9 for one in held)
    assert all(DEADBAND in one.labels for one in held[1:])
    assert abs(held[-1].after - held[0].after) <= rules.deadband / slope + 1e-9  # it does not run off


def test_it_holds_in_the_deadband_under_lag_and_noise() -> None:
    rules = controller(ema=0.8, gain=0.02, deadband=0.6)
    steering, plant = SetpointSteering(rules, 0.5), Plant(16.0, 4.0, lag=0.5, noise=0.5)
    decide(steering, plant, 150)
    errors = [one.numbers["error"] for one in decide(steering, plant, 400)]
    assert max(map(abs, errors)) <= rules.deadband
    assert steering.in_force == pytest.approx(1.5, abs=0.6 / 4.0)  # 16 - 4 * 1.5 = 10


def test_nothing_winds_up_behind_a_bound() -> None:
    """500 windows at the bound with a large error; the first value on the other side turns the knob around."""
    steering, plant = SetpointSteering(controller(), 2.0), Plant(100.0, 1.0)
    stuck = decide(steering, plant, 500)
    assert stuck[-1].after == 4.0
    assert "is at its bound 4" in stuck[-1].reason
    plant.level = 5.0  # the metric is now 1, nine below its target
    (turned,) = decide(steering, plant, 1)
    assert turned.after == pytest.approx(3.9)


def test_corrections_inside_the_deadband_are_asymmetric() -> None:
    """Base 1, knob 2, deadband 1, gain 0.1: half a unit off is 0.05; a quarter of it is made, toward the base only."""
    rules = controller(deadband=1.0, rate=1.0)
    steering = SetpointSteering(rules, 1.0)
    steering.restore({"value": 2.0, "mean": 10.0, "num_updates": 5, "stayed": 9, "auditing": False})
    down = steering.observe({METRIC: 9.5})
    up = steering.observe({METRIC: 10.5})
    assert down is not None
    assert up is not None
    assert (down.before, down.after) == (2.0, pytest.approx(2.0 - 0.25 * 0.05))
    assert up.after == up.before
    assert "a correction toward the base value" in down.reason
    assert "0 of a correction away from the base value" in up.reason


def test_a_value_stays_as_long_as_it_must() -> None:
    steering, plant = SetpointSteering(controller(dwell=3), 2.0), Plant(100.0, 1.0)
    changes = [one.after - one.before for one in decide(steering, plant, 9)]
    assert [round(change, 6) for change in changes] == [0.1, 0, 0, 0, 0.1, 0, 0, 0, 0.1]


def test_an_audit_runs_the_base_value_and_changes_nothing_but_says_what_the_knob_bought() -> None:
    """Level 12, slope 1, target 10, base 0: three updates to 0.3, then a window at the base value."""
    rules = controller(audit_every=3, gain=0.05, deadband=0.0)
    steering, plant = SetpointSteering(rules, 0.0), Plant(12.0, 1.0)
    first = decide(steering, plant, 3)
    value, state = first[-1].after, steering.state()
    assert steering.in_force == 0.0  # the audit
    (audit,) = decide(steering, plant, 1)
    assert audit.labels == (AUDIT, WIN)
    assert (audit.before, audit.after) == (value, value)
    mean = 12.0 - first[-1].before  # the last window ran the value before
    assert audit.numbers["bought"] == pytest.approx(2.0 - (mean - 10.0))
    assert steering.state() == {**state, "auditing": False}
    assert steering.in_force == value

    useless = SetpointSteering(rules, 0.0)
    flat = [useless.observe({METRIC: 12.0}) for _ in range(4)][-1]
    assert flat is not None
    assert flat.labels == (AUDIT, TAX_ONLY)
    assert "away from" in flat.reason


def test_a_recommendation_moves_nothing_and_does_not_add_up() -> None:
    steering, plant = SetpointSteering(controller(mode="recommend", audit_every=2), 2.0), Plant(100.0, 1.0)
    found = decide(steering, plant, 50)
    assert {(one.before, one.after, one.in_force) for one in found} == {(2.0, 2.1, 2.0)}
    assert not any(AUDIT in one.labels for one in found)


def test_a_window_without_the_metric_is_no_update() -> None:
    steering = SetpointSteering(controller(), 2.0)
    before = steering.state()
    assert steering.observe({"loss": 3.0}) is None
    assert steering.state() == before


@settings(max_examples=40, deadline=None)
@given(
    at=st.integers(0, 40), audit_every=st.integers(1, 5), dwell=st.integers(0, 3), ema=st.floats(0.0, 0.9),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_a_resume_at_any_moment_goes_on_the_same(
    at: int, audit_every: int, dwell: int, ema: float, seed: int
) -> None:
    """Also in the middle of an audit: the state travels as JSON."""
    rules = controller(audit_every=audit_every, dwell=dwell, ema=ema)
    noise = random.Random(seed)
    values = [{METRIC: 10.0 + noise.uniform(-5, 5)} for _ in range(60)]
    whole = SetpointSteering(rules, 2.0)
    expected = [(whole.in_force, whole.observe(value)) for value in values]
    first = SetpointSteering(rules, 2.0)
    found = [(first.in_force, first.observe(value)) for value in values[:at]]
    second = SetpointSteering(rules, 2.0)
    second.restore(json.loads(json.dumps(first.state())))
    found += [(second.in_force, second.observe(value)) for value in values[at:]]
    assert found == expected
