"""The payload contract: a table of everything it refuses, and what it keeps."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordexp.errors import ContractError
from coordexp.metrics.payload import build_payload, validate_payload

GOOD: dict[str, Any] = {"schema_version": 1, "mode": "train", "global_step": 7, "metrics": {"loss": 2.5}}


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD.items() if name != key}


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (without("schema_version"), "schema_version is missing; supported: 1 (an integer)"),
        ({**GOOD, "schema_version": 1.0}, "schema_version is 1.0 (float), not an integer; supported: 1"),
        ({**GOOD, "schema_version": True}, "schema_version is True (bool), not an integer; supported: 1"),
        ({**GOOD, "schema_version": "1"}, "schema_version is '1' (str), not an integer; supported: 1"),
        ({**GOOD, "schema_version": None}, "schema_version is None (NoneType), not an integer; supported: 1"),
        ({**GOOD, "schema_version": 2}, "schema_version 2 is not supported; supported: 1"),
        ({**GOOD, "schema_version": 0}, "schema_version 0 is not supported; supported: 1"),
        (without("mode"), "mode is missing"),
        ({**GOOD, "mode": "test"}, "mode is 'test' (str); expected 'train' or 'eval'"),
        ({**GOOD, "mode": ["train"]}, "mode is ['train'] (list)"),
        (without("global_step"), "global_step is missing"),
        ({**GOOD, "global_step": -1}, "global_step is -1 (int); expected an integer >= 0"),
        ({**GOOD, "global_step": 7.0}, "global_step is 7.0 (float)"),
        ({**GOOD, "global_step": True}, "global_step is True (bool)"),
        (without("metrics"), "metrics is missing"),
        ({**GOOD, "metrics": [("loss", 1.0)]}, "expected a mapping of key to number"),
        ({**GOOD, "metrics": {3: 1.0}}, "metric key 3 (int); expected a non-empty string"),
        ({**GOOD, "metrics": {"": 1.0}}, "metric key '' (str); expected a non-empty string"),
        ({**GOOD, "metrics": {"loss": math.nan}}, "metrics['loss'] is nan (float); expected a finite"),
        ({**GOOD, "metrics": {"loss": math.inf}}, "metrics['loss'] is inf (float)"),
        ({**GOOD, "metrics": {"loss": -math.inf}}, "metrics['loss'] is -inf (float)"),
        ({**GOOD, "metrics": {"loss": np.float32("nan")}}, "metrics['loss'] is "),
        ({**GOOD, "metrics": {"loss": "2.5"}}, "metrics['loss'] is '2.5' (str)"),
        ({**GOOD, "metrics": {"loss": True}}, "metrics['loss'] is True (bool)"),
        ({**GOOD, "metrics": {"loss": None}}, "metrics['loss'] is None (NoneType)"),
        ({**GOOD, "metrics": {"loss": 1 + 0j}}, "metrics['loss'] is (1+0j) (complex)"),
        ([GOOD], "expected a mapping with schema_version"),
        (None, "found None (NoneType)"),
    ],
)
def test_refused_with_what_was_found(payload: object, expected: str) -> None:
    with pytest.raises(ContractError) as caught:
        validate_payload(payload)
    assert expected in str(caught.value)


def test_built_payload_is_plain_and_validates_to_itself() -> None:
    payload = build_payload("eval", 12, {"eval_loss": np.float32(0.5), "eval_rollout/matched": np.int64(3)})
    assert payload == {
        "schema_version": 1,
        "mode": "eval",
        "global_step": 12,
        "metrics": {"eval_loss": 0.5, "eval_rollout/matched": 3},
    }
    assert validate_payload(json.loads(json.dumps(payload))) == payload


def test_further_sections_are_kept() -> None:
    payload = build_payload("train", 0, {}, timing={"step_s": 1.5})
    assert payload["timing"] == {"step_s": 1.5}
    assert validate_payload({**GOOD, "host": "a"})["host"] == "a"


def test_helper_keys_never_leave() -> None:
    metrics = {"rollout/_matched_num": 3.0, "_step": 1.0, "rollout/f1": 0.5, "desc_token_acc": 1.0}
    assert set(build_payload("train", 1, metrics)["metrics"]) == {"rollout/f1", "desc_token_acc"}


def test_a_section_cannot_replace_the_version() -> None:
    assert build_payload("train", 1, {}, schema_version=9)["schema_version"] == 1


@given(
    st.sampled_from(["train", "eval"]),
    st.integers(0, 10**9),
    st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9/]{0,20}", fullmatch=True),
        st.one_of(st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False)),
        max_size=8,
    ),
)
def test_valid_payloads_round_trip(mode: str, step: int, metrics: dict[str, float]) -> None:
    payload = build_payload(mode, step, metrics)
    assert payload["metrics"] == metrics
    assert validate_payload(json.loads(json.dumps(payload))) == payload
