"""Conditions as text: each form, what it holds for, and what cannot be read; and the telemetry section of run files."""

from __future__ import annotations

import pytest

from coordexp.config.checks.yaml_tree import parse_yaml
from coordexp.config.run.load import resolve_run
from coordexp.errors import ConfigError
from coordexp.telemetry.rules.check import rule_problems
from coordexp.telemetry.rules.condition import Clause, parse_condition


@pytest.mark.parametrize(
    ("text", "clause"),
    [
        ("> 0.5", Clause(None, ">", 0.5)),
        ("<= -1e-3", Clause(None, "<=", -0.001)),
        ("< 0.6 x best", Clause(None, "<", 0.0, "best", 0.6)),
        ("< best - 0.1", Clause(None, "<", -0.1, "best", 1.0)),
        ("<= best", Clause(None, "<=", 0.0, "best", 1.0)),
        ("> usual + 2", Clause(None, ">", 2.0, "usual", 1.0)),
        ("falls < 1% in 200", Clause(None, "<", 1.0, trend="falls", span=200)),
        ("rollout/recall rises >= 5.5% in 20", Clause("rollout/recall", ">=", 5.5, trend="rises", span=20)),
        ("train_speed(s/it) > 3 x usual", Clause("train_speed(s/it)", ">", 0.0, "usual", 3.0)),
    ],
)
def test_each_form(text, clause):
    assert parse_condition(text) == (clause,)
    assert parse_condition(f"{text} and loss != 3") == (clause, Clause("loss", "!=", 3.0))


UNREADABLE = """
(nothing)|0.5|>|> much|> nan|=> 3|> 1 and|and > 1|< 2 best|< best * 2|falls 1% in 200|falls < 1 in 200
falls < 1% in 1.5|falls < 1% in 1|> 1 or < 0|rises < 1% over 20|< 0.6 x worst
"""


@pytest.mark.parametrize("text", UNREADABLE.strip().replace("\n", "|").replace("(nothing)", "").split("|"))
def test_what_cannot_be_read_is_named(text):
    with pytest.raises(ValueError, match=r"cannot read the clause `.*`; expected one such as `> 0.5`"):
        parse_condition(text)


@pytest.mark.parametrize(
    ("clause", "value", "level", "change", "expected"),
    [
        ("> 2", 2.0, None, None, False),
        (">= 2", 2.0, None, None, True),
        ("< 0.5 x best", 4.9, 10.0, None, True),
        ("< 0.5 x best", 5.0, 10.0, None, False),
        ("< best - 1", 8.9, 10.0, None, True),
        ("< best - 1", 1.0, None, None, False),  # nothing is known yet
        ("falls < 1% in 10", 7.0, None, -0.009, True),
        ("falls < 1% in 10", 7.0, None, -0.011, False),
        ("falls < 1% in 10", 7.0, None, 0.5, True),  # it rose
        ("rises > 5% in 10", 7.0, None, 0.051, True),
        ("rises > 5% in 10", 7.0, None, None, False),
    ],
)
def test_what_it_holds_for(clause, value, level, change, expected):
    (parsed,) = parse_condition(clause)
    assert parsed.holds(value, level, change) is expected


# run files

RUN = """\
model: {model: m}
training: {max_steps: 10}
custom: {train_jsonl: data/train.jsonl, trainer_variant: stage1_coord}
telemetry:
  rules:
    - {name: mine, key: loss, condition: "> 9", meaning: it is high, action: lower it}
    - {name: other, key: KEY, condition: "CONDITION", meaning: m, action: a}
  silenced: [SILENCED]
  stop_on: [mine, STOP]
"""
FINE = {
    "KEY": "eval_rollout/f1",
    "CONDITION": "< best - 0.2",
    "SILENCED": "data_slow",
    "STOP": "nonfinite_loss",
}


def load(**replaced):
    text = RUN
    for word, value in {**FINE, **replaced}.items():
        text = text.replace(word, value)
    return resolve_run(parse_yaml(text, "run.yaml"), "run.yaml", checks=(rule_problems,))


def test_a_run_file_with_rules_of_its_own():
    telemetry = load().sections.telemetry
    assert [rule.name for rule in telemetry.rules] == ["mine", "other"]
    assert telemetry.stop_on == ["mine", "nonfinite_loss"]


@pytest.mark.parametrize(
    ("replaced", "expected"),
    [
        (
            {"KEY": "rollout/f1x"},
            'telemetry.rules[1].key = "rollout/f1x": rollout/f1x is not in the catalogue of metrics; did you mean '
            "rollout/f1?",
        ),
        (
            {"KEY": "loss/ce"},
            'telemetry.rules[1].key = "loss/ce": loss/ce is not in the catalogue of metrics; it was replaced by '
            "loss/<provenance>/struct_ce",
        ),
        (
            {"CONDITION": "< better"},
            'telemetry.rules[1].condition = "< better": cannot read the clause `< better`',
        ),
        ({"CONDITION": "> 1 and rollout/recal < 2"}, "telemetry.rules[1].condition"),
        ({"KEY": "rollout/temperature"}, "neither more nor less of rollout/temperature is better"),
        (
            {"STOP": "nonfinite_los"},
            'telemetry.stop_on[1] = "nonfinite_los": there is no such rule (did you mean nonfinite_loss?)',
        ),
        (
            {"STOP": "generation_waits"},
            'telemetry.stop_on[1] = "generation_waits": has no effect with trainer variant stage1_coord',
        ),
        ({"SILENCED": "mine"}, 'telemetry.stop_on[0] = "mine": is silenced, so it cannot end the run.'),
        ({"SILENCED": "no_such"}, 'telemetry.silenced[0] = "no_such": there is no such rule'),
        ({"name: other": "name: mine"}, 'telemetry.rules[1].name = "mine": names a rule that stands above.'),
        ({"name: other": "name: Other"}, "telemetry.rules[1].name"),
        ({"action: a": "step: a"}, "telemetry.rules[1]"),
    ],
)
def test_what_is_wrong_with_rules_is_said_with_its_path(replaced, expected):
    with pytest.raises(ConfigError) as caught:
        load(**replaced)
    assert expected in str(caught.value)
