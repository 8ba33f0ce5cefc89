"""Gates between stages: what is met, what fails, and what a missing or broken number means."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordexp.control.acceptance import (
    Criterion,
    Judgement,
    OnFail,
    Outcome,
    Reference,
    at_step,
    judge,
    outcome,
)
from coordexp.errors import ConfigError

NAN = math.nan
F1 = [(100, 0.30), (200, 0.50), (300, 0.40)]

CASES = [
    # the last record decides
    (Criterion("m", ">=", 0.4), F1, True, 0.40, 300),
    (Criterion("m", ">", 0.4), F1, False, 0.40, 300),
    (Criterion("m", "<=", 0.4), F1, True, 0.40, 300),
    (Criterion("m", "<", 0.4), F1, False, 0.40, 300),
    # the mean of the last two
    (Criterion("m", ">=", 0.45, window=2), F1, True, 0.45, 300),
    (Criterion("m", ">=", 0.46, window=2), F1, False, 0.45, 300),
    (Criterion("m", ">=", 0.1, window=4), F1, False, None, None),  # there are only three
    # reached at some step, though not kept
    (Criterion("m", ">=", 0.5, by_step=300), F1, True, 0.50, 200),
    (Criterion("m", ">=", 0.5, by_step=150), F1, False, 0.30, 100),
    (Criterion("m", "<=", 0.2, by_step=300), F1, False, 0.30, 100),  # the nearest to it
    (Criterion("m", ">=", 0.4, window=2, by_step=200), F1, True, 0.40, 200),
    # missing and broken numbers
    (Criterion("m", ">=", 0.0), [], False, None, None),
    (Criterion("m", ">=", 0.0, by_step=50), F1, False, None, None),
    (Criterion("m", ">=", 0.0), [(1, 1.0), (2, NAN)], False, None, 2),
    (Criterion("m", ">=", 0.0, by_step=9), [(1, 1.0), (2, NAN)], False, None, 2),
    (Criterion("m", ">=", 0.0, window=2), [(1, NAN), (2, 1.0)], False, None, 2),
    (Criterion("m", "<=", 9.0), [(1, math.inf)], False, None, 1),
]


@pytest.mark.parametrize(("criterion", "series", "passed", "found", "step"), CASES)
def test_a_criterion_is_met_or_not(criterion, series, passed, found, step):
    told = judge(criterion, series)
    assert (told.passed, told.step) == (passed, step)
    assert told.found == (None if found is None else pytest.approx(found, abs=1e-12))
    assert told.reason


AS_GOOD = Criterion("f1", ">=", 0.9, of=Reference("f1", "text"))
RELATIVE = [
    # 0.9 x 0.5 = 0.45
    (AS_GOOD, [(10, 0.44)], (500, 0.5), False, "0.44 at step 10; 0.9 x 0.5 (step 500) = 0.45"),
    (AS_GOOD, [(10, 0.45)], (500, 0.5), True, "0.45 at step 10; 0.9 x 0.5 (step 500) = 0.45"),
    (AS_GOOD, [(10, 0.2), (20, 0.46)], (500, 0.5), True, "0.46 at step 20; 0.9 x 0.5 (step 500) = 0.45"),
    # the mean of 0.4 and 0.6 is no more than 1.25 x 0.4
    (
        replace(AS_GOOD, op=">", value=1.25, window=2),
        [(1, 0.4), (2, 0.6)],
        (9, 0.4),
        False,
        "0.5 at step 2; 1.25 x 0.4",
    ),
    (replace(AS_GOOD, by_step=1), [(1, 0.5), (2, 0.0)], (9, 0.5), True, "0.5 at step 1; 0.9 x 0.5"),
    # missing and broken numbers
    (AS_GOOD, [(10, 0.9)], None, False, "f1 of stage text was never logged"),
    (AS_GOOD, [(10, 0.9)], (500, NAN), False, "f1 of stage text is not finite at step 500"),
    (AS_GOOD, [], (500, 0.5), False, "f1 was never logged"),
]


@pytest.mark.parametrize(("criterion", "series", "reference", "passed", "reason"), RELATIVE)
def test_a_criterion_compares_with_another_number(criterion, series, reference, passed, reason):
    told = judge(criterion, series, reference)
    assert told.passed is passed
    assert reason in told.reason
    assert told.criterion is criterion


def test_what_is_compared_is_said_in_words():
    assert str(AS_GOOD) == "f1 >= 0.9 x f1 of stage text"
    best = Criterion("a", "<", 2, window=3, of=Reference("b", None, "best"))
    assert str(best) == "a < 2 x b, best checkpoint, mean of 3 records"


def test_a_record_is_that_of_a_step_or_the_last():
    assert at_step(F1) == (300, 0.40)
    assert at_step(F1, 200) == (200, 0.50)
    assert at_step(F1, 250) is None
    assert at_step([]) is None


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20),
    st.sampled_from([">=", ">", "<=", "<"]),
    st.floats(-1e6, 1e6),
)
def test_a_window_of_one_compares_the_last_number_and_by_step_any_of_them(values, op, value):
    series = list(enumerate(values))
    compare = {">=": float.__ge__, ">": float.__gt__, "<=": float.__le__, "<": float.__lt__}[op]
    assert judge(Criterion("m", op, value), series).passed is compare(values[-1], value)
    reached = judge(Criterion("m", op, value, by_step=len(values)), series)
    assert reached.passed is any(compare(one, value) for one in values)


@pytest.mark.parametrize(
    ("failed", "expected"),
    [
        ([], Outcome.ACCEPTED),
        ([OnFail.WARN], Outcome.WARNED),
        ([OnFail.WARN, OnFail.BACK_TO_BEST], Outcome.BACK_TO_BEST),
        ([OnFail.BACK_TO_BEST, OnFail.STOP], Outcome.REFUSED),
    ],
)
def test_the_gravest_failure_decides(failed, expected):
    met = Judgement(Criterion("m", ">", 0.0), True, "")
    judgements = [met, *(Judgement(Criterion("m", ">", 0.0, on_fail=what), False, "") for what in failed)]
    assert outcome(judgements) is expected
    assert expected.goes_on is (OnFail.STOP not in failed)


@pytest.mark.parametrize(("op", "window", "named"), [("=", 1, "op = '='"), (">", 0, "window = 0")])
def test_what_can_never_be_judged_is_refused(op, window, named):
    with pytest.raises(ConfigError, match=named):
        Criterion("m", op, 1.0, window)
