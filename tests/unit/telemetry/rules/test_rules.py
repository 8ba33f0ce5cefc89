"""Every rule trips on a series that is bad and stays silent on one that is not; where and when exactly, by hand."""

from __future__ import annotations

import json

import pytest

from coordexp.config.schema.telemetry import Telemetry
from coordexp.metrics.catalog import lookup
from coordexp.telemetry.rules.ranges import RANGES, healthy_range, is_healthy
from coordexp.telemetry.rules.rule import WatchRule
from coordexp.telemetry.rules.table import RULES, rules_of
from coordexp.telemetry.rules.watch import Judge, WatchState, due

EVERY_10 = range(0, 600, 10)


def steady(key, value, steps=EVERY_10, **others):
    """Records in which a number has one value."""
    return [(step, {key: value, **others}) for step in steps]


def line(key, start, end, steps=EVERY_10, **others):
    """Records in which a number goes in a straight line from one value to another."""
    steps = list(steps)
    width = len(steps) - 1
    return [
        (step, {key: start + (end - start) * index / width, **others}) for index, step in enumerate(steps)
    ]


def once(metrics):
    return [(300, metrics)]


def jump(key, before, after, at=300):
    """Records in which a number changes for good at a step."""
    return [(step, {key: before if step < at else after}) for step in EVERY_10]


FLAT, FALLS = steady("base_ce/loss", 1.2), line("base_ce/loss", 3.0, 0.6)
OPPOSED = "gradient/cos/coord_diag/soft_ce/coord_diag/w1"
MAE = "coord_diag/expected_bin_mae"
CASES = {
    # rule: (records that are bad, records that are not)
    "grad_norm_high": (jump("grad_norm", 1.0, 4.0), jump("grad_norm", 1.0, 2.9)),
    "terms_oppose": (steady(OPPOSED, -0.7), steady(OPPOSED, -0.4)),
    "grad_norm_zero": (steady("grad_norm", 0.0), steady("grad_norm", 1e-6)),
    "learning_rate_zero": (steady("learning_rate", 0.0), line("learning_rate", 1e-4, 0.0)),
    "warmup_long": (steady("lr/phase", 0.0), jump("lr/phase", 0.0, 1.0, at=330)),
    "data_slow": (
        steady("time/share_data", 0.3),
        [*steady("time/share_data", 0.3, [20, 60]), (70, {"time/share_data": 0.1})],
    ),
    "push_slow": (steady("time/share_push", 0.4), steady("time/share_push", 0.2)),
    "packs_empty": (
        steady("packing/utilization", 0.5, **{"packing/mode": 1.0}),
        steady("packing/utilization", 0.5, **{"packing/mode": 0.0}),  # padded batches
    ),
    "memory_grows": (
        line("memory/peak_gb", 10.0, 20.0, range(0, 1200, 10)),
        jump("memory/peak_gb", 10.0, 20.0, at=50),
    ),
    "nonfinite_metric": (once({"health/nonfinite_metrics_total": 2}), once({})),
    "nonfinite_loss": (once({"health/nonfinite_loss_total": 1}), once({})),
    "oom_retries": (once({"health/oom_retries_total": 1}), once({"health/oom_retries_total": 0})),
    "text_loss_flat": (FLAT, FALLS),
    "loss_rises": (line("loss", 1.0, 3.0), line("loss", 3.0, 1.0)),
    "bins_at_chance": (line(MAE, 250.0, 240.0), line(MAE, 250.0, 20.0)),
    "coord_mass_low": (
        steady("coord_diag/coord_vocab_mass", 0.5),
        steady("coord_diag/coord_vocab_mass", 0.97),
    ),
    "flips_to_text": (
        steady("coord_monitor/flip_coord_to_noncoord", 0.2),
        jump("coord_monitor/flip_coord_to_noncoord", 0.2, 0.0, at=200),
    ),
    "flips_to_coord": (
        steady("coord_monitor/flip_text_to_coord", 0.1),
        steady("coord_monitor/flip_text_to_coord", 0.001),
    ),
    "tokens_slower": (jump("train/tokens_per_s", 1000.0, 500.0), jump("train/tokens_per_s", 1000.0, 700.0)),
    "samples_replaced": (once({"health/samples_replaced_total": 3}), once({})),
    "types_skipped": (once({"health/token_types_skipped_total": 1}), once({})),
    "truncated": (once({"rollout/parse_truncated_rate": 0.51}), once({"rollout/parse_truncated_rate": 0.5})),
    "parse_drop": (once({"rollout/parse_obj_drop_frac": 0.21}), once({"rollout/parse_obj_drop_frac": 0.2})),
    "no_prediction": (
        once({"rollout/sample_valid_pred_rate": 0.49}),
        once({"rollout/sample_valid_pred_rate": 0.5}),
    ),
    "duplicates": (once({"rollout/duplicate_rate_mean": 0.31}), once({"rollout/duplicate_rate_mean": 0.3})),
    "excluded": (once({"rollout/excluded_rate": 0.01}), once({"rollout/excluded_rate": 0.0})),
    "closure_drop": (
        once({"stage2_ab/channel_b/closure_supervision/N_drop": 1}),
        once({"stage2_ab/channel_b/closure_supervision/N_drop": 0}),
    ),
    "gating": (
        once({"rollout/gating_rejection_rate": 0.91, "rollout/recall": 0.2}),
        once({"rollout/gating_rejection_rate": 0.91, "rollout/recall": 0.8}),  # a crowded image, all found
    ),
    "slow_generation": (
        jump("rollout/gen_tokens_per_s", 200.0, 99.0),
        jump("rollout/gen_tokens_per_s", 200.0, 101.0),
    ),
    "generation_waits": (steady("time/share_generation", 0.9), steady("time/share_generation", 0.7)),
    "f1_fell": (line("eval_rollout/f1", 0.7, 0.59, [10, 20]), line("eval_rollout/f1", 0.7, 0.61, [10, 20])),
    "map_fell": (jump("eval_rollout/mAP", 0.4, 0.34), jump("eval_rollout/mAP", 0.4, 0.36)),
    "stalled": (line("eval_rollout/f1", 0.7, 0.65, range(9)), line("eval_rollout/f1", 0.5, 0.6, range(20))),
    "overfit": (line("eval_loss", 1.0, 2.0), line("eval_loss", 2.0, 1.0)),
    "empty_answers": (
        once({"eval_rollout/precision": 1.0, "eval_rollout/pred_objects": 0.0}),
        once({"eval_rollout/precision": 1.0, "eval_rollout/pred_objects": 3.0}),
    ),
    "coco_failed": (once({"eval_rollout/coco_eval_ok": 0}), once({"eval_rollout/coco_eval_ok": 1})),
}


NOTHING_SEEN = WatchState()


def run(rules, records, *, total_steps=1000, state=NOTHING_SEEN):
    """Findings of each record, and the state after the last one."""
    judge, found = Judge(rules, total_steps), []
    for step, metrics in records:
        state, findings = judge(state, step, metrics)
        found.append(findings)
    return found, state


def rule(condition, key="loss", **fields):
    return WatchRule("mine", (key,), condition, "it is bad", "mend it", **fields)


def test_every_rule_has_a_case_known_keys_and_a_name_of_its_own():
    assert [one.name for one in RULES] == list(dict.fromkeys(CASES)), "one case for each rule, in their order"
    for one in RULES:
        named = {clause.key for clause in one.clauses if clause.key is not None}
        assert all(lookup(key) for key in {*one.keys, *named}), one.name
        for clause in one.clauses:
            if clause.level == "best":
                assert all(lookup(key).better for key in one.keys)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_trips_on_bad_records_and_on_no_others(name):
    bad, good = CASES[name]
    found, _ = run(RULES, bad)
    last = {finding.rule: finding for finding in found[-1]}
    assert list(last) == [name]
    finding, (chosen,) = last[name], [one for one in RULES if one.name == name]
    assert finding.message == (
        f"{finding.key} = {bad[-1][1][finding.key]:.4g} ({chosen.condition}"
        f"{' ' * bool(chosen.how_long)}{chosen.how_long}): {chosen.meaning}. What to do: {chosen.action}."
    )
    assert not any(run(RULES, good)[0])


@pytest.mark.parametrize("name", ["truncated", "gating", "nonfinite_metric"])
def test_rules_of_both_judge_the_numbers_of_an_evaluation(name):
    bad, good = (
        [(step, {f"eval_{key}": value for key, value in metrics.items()}) for step, metrics in records]
        for records in CASES[name]
    )
    (findings,) = run(RULES, bad)[0]
    assert [(finding.rule, finding.key) for finding in findings] == [(name, next(iter(bad[0][1])))]
    assert run(RULES, good)[0] == [()]


def test_how_long_it_takes():
    held = rule("> 1", for_steps=20, for_records=3)
    steps = [(0, 2), (10, 2), (20, 2), (25, 2), (30, 0), (40, 2), (80, 2), (90, 2)]
    found, _ = run([held], [(step, {"loss": value}) for step, value in steps])
    assert [[finding.since for finding in findings] for findings in found] == [
        [],
        [],
        [0],
        [0],
        [],
        [],
        [],
        [40],
    ]


def test_records_without_the_number_change_nothing():
    held = rule("> 1", for_records=3)
    found, _ = run(
        [held], [(0, {"loss": 2}), (1, {}), (2, {"loss": 2}), (3, {"eval_loss": 0}), (4, {"loss": 2})]
    )
    assert [len(findings) for findings in found] == [0, 0, 0, 0, 1]


def test_when_it_begins():
    at_30 = rule("> 1", from_step=30)
    assert [len(f) for f in run([at_30], steady("loss", 2, [0, 29, 30]))[0]] == [0, 0, 1]
    share = rule("> 1", from_share=0.5)
    assert [len(f) for f in run([share], steady("loss", 2, [0, 49, 50]), total_steps=100)[0]] == [0, 0, 1]
    assert not any(run([share], steady("loss", 2, [0, 500]), total_steps=None)[0])


def test_the_best_so_far_by_the_direction_of_the_number():
    fell = run(
        [rule("< best - 0.1", "eval_rollout/f1")],
        [(i, {"eval_rollout/f1": v}) for i, v in enumerate((0.5, 0.7, 0.61, 0.59, 0.75, 0.6))],
    )[0]
    assert [len(findings) for findings in fell] == [0, 0, 0, 1, 0, 1]
    rose = run(
        [rule("> 1.1 x best", "eval_loss")],
        [(i, {"eval_loss": v}) for i, v in enumerate((2.0, 1.0, 1.09, 1.2, 0.5, 0.56))],
    )[0]
    assert [len(findings) for findings in rose] == [0, 0, 0, 1, 0, 1]


def test_the_usual_value_is_a_median_that_outliers_do_not_move():
    spike = rule("> 3 x usual", "grad_norm")
    values = [1.0] * 9 + [9.0, 1.0, 9.0] + [9.0] * 200 + [2.9]
    found, state = run([spike], [(step, {"grad_norm": value}) for step, value in enumerate(values)])
    assert [len(findings) for findings in found] == [0] * 11 + [1] * 201 + [0]  # ten values make it known
    assert state.usual["grad_norm"] == (*[1.0] * 9, 9.0, 1.0, 2.9)


def test_a_trend_compares_one_half_of_its_span_with_the_other():
    flat = rule("falls < 10% in 4")
    values = [10, 10, 9.5, 9.3, 8, 8, 7.9, 7.7]  # means of pairs 10, 9.4, 8, 7.8: falls of 6, 14.9 and 2.5 %
    found, _ = run([flat], [(step, {"loss": value}) for step, value in enumerate([*values, 0, 0])])
    # known at the first record after a pair, and true until the next one
    assert [len(findings) for findings in found] == [0, 0, 0, 0, 1, 1, 0, 0, 1, 1]


def test_a_trend_says_nothing_across_a_gap_in_the_records():
    flat = rule("falls < 10% in 4")
    found, _ = run([flat], steady("loss", 1.0, [0, 1, 2, 3, 4, 5, 90, 91, 92]))
    assert [len(findings) for findings in found] == [0, 0, 0, 0, 1, 1, 0, 0, 0]


def test_a_rule_is_said_once_in_a_while():
    held, state, said = rule("> 1"), WatchState(), []
    judge = Judge([held])
    for step in (0, 4, 9, 10, 13, 20):
        state, findings = judge(state, step, {"loss": 2.0})
        state, fresh = due(state, findings, step, repeat_after=10)
        said.append(len(fresh))
    assert said == [1, 0, 0, 1, 0, 1]


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_watch_goes_on_where_the_checkpoint_was(name):
    records, _ = CASES[name]
    whole, end = run(RULES, records)
    for cut in (1, 17, 37):
        first, state = run(RULES, records[:cut])
        state = WatchState.from_json(json.loads(json.dumps(state.to_json())))
        second, resumed_end = run(RULES, records[cut:], state=state)
        assert (first + second, resumed_end) == (whole, end)


def test_judging_leaves_the_state_before_as_it_was():
    _, state = run(RULES, FLAT[:30])
    before = json.dumps(state.to_json())
    run(RULES, FLAT[30:], state=state)
    assert json.dumps(state.to_json()) == before


# the rules of a run


def test_rules_of_a_run_are_those_of_its_stage_with_its_own_over_them():
    own = {
        "name": "data_slow",
        "key": "time/share_data",
        "condition": "> 0.05",
        "meaning": "m",
        "action": "a",
    }
    other = {**own, "name": "mine", "key": "loss", "condition": "> 9"}
    settings = Telemetry.model_validate({"rules": [own, other], "silenced": ["oom_retries"]})
    chosen = {one.name: one for one in rules_of(settings, "stage1_coord")}
    assert (chosen["data_slow"].condition, chosen["mine"].keys) == ("> 0.05", ("loss",))
    assert chosen.keys() & {"oom_retries", "tokens_slower", "generation_waits"} == {"tokens_slower"}
    assert "generation_waits" in {one.name for one in rules_of(settings, "stage2_two_channel")}


# healthy ranges


def test_ranges_are_of_known_numbers_once_each_and_not_empty():
    keys = [entry.key for entry in RANGES]
    assert len(set(keys)) == len(keys)
    for entry in RANGES:
        assert lookup(entry.key) is not None
        assert (entry.low, entry.high) != (None, None)
        assert entry.low is None or entry.high is None or entry.low < entry.high


def test_a_range_holds_at_its_bounds_and_begins_at_its_step():
    assert healthy_range("coord_diag/coord_vocab_mass").low == 0.95
    assert healthy_range("eval_rollout/parse_truncated_rate") is healthy_range("rollout/parse_truncated_rate")
    assert healthy_range("loss") is None
    judged = [is_healthy("coord_diag/coord_vocab_mass", value, 200) for value in (0.94, 0.95, 1.0)]
    assert judged == [False, True, True]
    assert is_healthy("coord_diag/coord_vocab_mass", 0.1, 199) is None
    assert [is_healthy("grad_norm", value, 100) for value in (0.0, 20.0, 20.1)] == [False, True, False]


@pytest.mark.parametrize("name", CASES)
def test_no_bad_series_lies_in_a_healthy_range(name):
    """A rule never calls bad what a range calls healthy: those with a bound at a value, at their last record."""
    records, _ = CASES[name]
    step, metrics = records[-1]
    (chosen,) = [one for one in RULES if one.name == name]
    absolute = all(
        clause.level is None and clause.trend is None and clause.key is None for clause in chosen.clauses
    )
    for key in metrics.keys() & {*chosen.keys}:
        if absolute and healthy_range(key) is not None:
            assert is_healthy(key, metrics[key], step) in (False, None)
