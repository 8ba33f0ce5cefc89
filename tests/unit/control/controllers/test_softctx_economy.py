"""The price of self-context forwards, on made-up windows."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.config.schema.training import SoftctxEconomy
from coordexp.control.controllers.decisions import AUDIT, CONFIDENCE, DEADBAND, TAX_ONLY, WIN, Decision
from coordexp.control.controllers.economy import EconomySteering, ForwardsSeen


def economy(**changes: Any) -> SoftctxEconomy:
    written = {
        "kind": "softctx_economy", "name": "forwards", "forced": 3, "observed": 2, "dwell": 0, "ema": 0.5,
        "audit_every": 10, "mode": "act", **changes,
    }  # fmt: skip
    return SoftctxEconomy.model_validate(written)


def run(steering: EconomySteering, number: int, gain: float, entropy: float = -0.1) -> list[Decision]:
    """Windows in which every further forward together gains `gain`."""
    found = []
    for _ in range(number):
        forwards = steering.in_force
        seen = ForwardsSeen(forwards) if forwards == 1 else ForwardsSeen(forwards, gain, entropy)
        found.append(steering.observe(seen))
    return [decision for decision in found if decision is not None]


def test_a_second_forward_that_buys_nothing_is_given_up_when_it_gets_a_price() -> None:
    steering = EconomySteering(economy(), 2)
    found = run(steering, 12, gain=0.0, entropy=0.02)
    assert [one.after for one in found] == [2] * 5 + [1] * 6 + [1]  # 3 forced, 2 free, then priced
    assert [one.numbers["price"] for one in found][:6] == [0, 0, 0, 0, 0, 0.01]
    assert all(one.labels[-1:] == (TAX_ONLY,) for one in found[:6])  # the last ran two forwards, too
    assert found[0].reason == "forced warm-up, update 1 of 3"
    assert found[5].reason.endswith("net worth of 1: 0, 2: -0.01 at price 0.01; 1 is best")
    assert found[10].labels[0] == AUDIT  # after the tenth update
    assert found[10].numbers["survival_2"] == pytest.approx(7 / 11)  # 6 windows and the audit


def test_a_second_forward_that_earns_more_than_the_highest_price_stays() -> None:
    steering = EconomySteering(economy(), 2)
    found = run(steering, 300, gain=0.08)
    assert {one.after for one in found} == {2}
    assert all(one.labels[-2:] == (WIN, CONFIDENCE) for one in found)
    prices = [one.numbers["price"] for one in found if AUDIT not in one.labels]
    assert prices == sorted(prices)
    assert prices[-1] == 0.05  # two forwards are more than 1.3: it rises to its bound, and no further
    assert max(b - a for a, b in pairwise(prices[5:])) <= 0.002 + 1e-12
    assert found[-1].numbers["coupon"] == pytest.approx(0.08)
    assert found[-1].numbers["tax"] == pytest.approx(0.05)


def test_an_audit_finds_out_that_a_forward_has_begun_to_help() -> None:
    steering = EconomySteering(economy(), 2)
    run(steering, 60, gain=0.0)
    assert steering.in_force == 1
    later = run(steering, 30, gain=0.2)
    back = next(index for index, one in enumerate(later) if one.after == 2)
    assert AUDIT in later[back - 1].labels
    assert steering.in_force == 2


def test_harm_lowers_the_number_even_while_forwards_are_free() -> None:
    found = run(EconomySteering(economy(observed=100), 2), 5, gain=-0.05)
    assert [one.after for one in found] == [2, 2, 2, 1, 1]
    assert found[3].numbers["price"] == 0.0


def test_three_forwards_are_given_up_one_by_one() -> None:
    found = run(EconomySteering(economy(dwell=2), 3), 14, gain=0.0)
    assert [one.after for one in found if AUDIT not in one.labels] == [3] * 5 + [2] * 3 + [1] * 5


def test_inside_its_deadband_the_price_may_only_fall() -> None:
    """Mean 1.35, target 1.3, gain 0.005: a rise of 0.00025 is not made; a mean of 1.25 lets it fall by a quarter."""
    for mean, price in ((1.35, 0.01), (1.25, 0.01 - 0.25 * 0.005 * 0.05)):
        steering = EconomySteering(economy(ema=0.999999), 2)
        state = {"value": 1, "price": 0.01, "gains": {"2": 0.0}, "mean_forwards": mean, "num_updates": 50}
        steering.restore({**state, "stayed": 0, "ran": [1], "auditing": False})
        decision = steering.observe(ForwardsSeen(1.0))
        assert decision is not None
        assert decision.labels == (DEADBAND,)
        assert decision.numbers["price"] == pytest.approx(price, rel=1e-4)


def test_recommending_runs_all_forwards_and_says_what_it_would_do() -> None:
    steering = EconomySteering(economy(mode="recommend"), 2)
    found = run(steering, 20, gain=0.0)
    assert found[-1].after == 1
    assert {one.in_force for one in found} == {2.0}
    assert steering.survival() == [1.0, 1.0]
    assert not any(AUDIT in one.labels for one in found)


def test_a_window_without_a_step_on_ground_truth_is_no_update() -> None:
    steering = EconomySteering(economy(), 2)
    before = steering.state()
    assert steering.observe(None) is None
    assert steering.state() == before


@settings(max_examples=40, deadline=None)
@given(at=st.integers(0, 50), audit_every=st.integers(1, 6), base=st.integers(2, 4), seed=st.integers(0, 99))
def test_a_resume_at_any_moment_goes_on_the_same(at: int, audit_every: int, base: int, seed: int) -> None:
    """Also in the middle of an audit: the state travels as JSON."""
    rules = economy(audit_every=audit_every, dwell=1)
    draws = random.Random(seed)
    gains = [draws.uniform(-0.05, 0.1) for _ in range(60)]
    whole, first, second = (EconomySteering(rules, base) for _ in range(3))
    expected = [decision for gain in gains for decision in run(whole, 1, gain)]
    found = [decision for gain in gains[:at] for decision in run(first, 1, gain)]
    second.restore(json.loads(json.dumps(first.state())))
    found += [decision for gain in gains[at:] for decision in run(second, 1, gain)]
    assert found == expected
