"""Advice on windows, just beyond and just within each threshold; and the doctor's reading of a run folder."""

from __future__ import annotations

import json
import os
import time

import pytest

from coordexp.cli.main import main
from coordexp.metrics.catalog import lookup
from coordexp.metrics.payload import build_payload
from coordexp.metrics.sinks import MetricsSink, write_stats
from coordexp.telemetry.doctor import diagnose
from coordexp.telemetry.health import RULES, HealthWatch

CASES = {
    "truncated": (
        {"rollout/parse_truncated_rate": 0.51},
        {"rollout/parse_truncated_rate": 0.5},
        "max_new_tokens",
    ),
    "parse_drop": ({"rollout/parse_obj_drop_frac": 0.21}, {"rollout/parse_obj_drop_frac": 0.2}, "reason"),
    "no_prediction": (
        {"rollout/sample_valid_pred_rate": 0.49},
        {"rollout/sample_valid_pred_rate": 0.5},
        "stage-1",
    ),
    "excluded": ({"rollout/excluded_rate": 0.01}, {"rollout/excluded_rate": 0.0}, "chat template"),
    "closure_drop": (
        {"stage2_ab/channel_b/closure_supervision/N_drop": 1},
        {"stage2_ab/channel_b/closure_supervision/N_drop": 0},
        "normalizer",
    ),
    "gating": (
        {"rollout/gating_rejection_rate": 0.91, "rollout/recall": 0.2},
        {"rollout/gating_rejection_rate": 0.91, "rollout/recall": 0.8},  # a crowded image, all found
        "maskiou_gate",
    ),
    "coco_failed": ({"rollout/coco_eval_ok": 0}, {"rollout/coco_eval_ok": 1}, "mAP"),
    "nonfinite_metric": ({"health/nonfinite_metrics_total": 2}, {}, "learning rate"),
    "samples_replaced": ({"health/samples_replaced_total": 3}, {}, "strict: true"),
    "oom_retries": ({"health/oom_retries_total": 1}, {"health/oom_retries_total": 0}, "lower it"),
    "nonfinite_loss": ({"health/nonfinite_loss_total": 1}, {}, "learning rate"),
}


def kinds(advices):
    return [advice.kind for advice in advices]


def test_every_rule_has_a_case_and_a_known_key():
    assert {rule.kind for rule in RULES} == set(CASES)
    assert all(lookup(rule.key) for rule in RULES)


@pytest.mark.parametrize("prefix", ["", "eval_"])
@pytest.mark.parametrize("kind", CASES)
def test_a_rule_speaks_beyond_its_threshold_only(kind, prefix):
    bad, good, what_to_do = CASES[kind]
    bad, good = ({prefix + key: value for key, value in metrics.items()} for metrics in (bad, good))
    (advice,) = HealthWatch().look(bad)
    assert (advice.kind, advice.value) == (kind, next(iter(bad.values())))
    assert advice.message.startswith(f"{next(iter(bad))} = ")
    assert what_to_do in advice.message.partition("What to do: ")[2]
    assert HealthWatch().look(good) == []


def test_f1_against_its_best():
    watch = HealthWatch()
    found = [kinds(watch.look({"eval_rollout/f1": f1})) for f1 in (0.5, 0.7, 0.61, 0.59, 0.75, 0.6)]
    assert found == [[], [], [], ["f1_fell"], [], ["f1_fell"]]
    assert HealthWatch().look({"rollout/f1": 0.9}) == []


def test_speed_against_its_best():
    watch = HealthWatch()
    found = [kinds(watch.look({"rollout/gen_tokens_per_s": s})) for s in (100, 200, 101, 99)]
    assert found == [[], [], [], ["slow_generation"]]


def test_each_kind_is_due_once_in_a_while():
    watch = HealthWatch(repeat_after=10)
    bad = {"rollout/parse_truncated_rate": 0.9}
    worse = {**bad, "rollout/excluded_rate": 0.5}
    found = [kinds(watch.due(step, worse if step >= 4 else bad)) for step in (0, 4, 8, 10, 13, 14)]
    assert found == [["truncated"], ["excluded"], [], ["truncated"], [], ["excluded"]]


def test_a_resumed_watch_goes_on_where_the_checkpoint_was():
    windows = [
        (
            step,
            {"eval_rollout/f1": f1, "rollout/gen_tokens_per_s": speed, "rollout/parse_truncated_rate": 0.9},
        )
        for step, f1, speed in ((0, 0.7, 200.0), (6, 0.69, 150.0), (9, 0.55, 90.0), (12, 0.5, 210.0))
    ]
    whole, before, after = (HealthWatch(repeat_after=10) for _ in range(3))
    expected = [kinds(whole.due(*window)) for window in windows]
    assert expected == [["truncated"], [], ["f1_fell", "slow_generation"], ["truncated"]]
    found = [kinds(before.due(*window)) for window in windows[:2]]
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert found + [kinds(after.due(*window)) for window in windows[2:]] == expected
    forgetful = HealthWatch(repeat_after=10)
    assert [kinds(forgetful.due(*window)) for window in windows[2:]] != expected[2:]


# the doctor


def write_run(folder, payloads, *, age=0.0, checkpoints=(), **resolved):
    """A run folder as the trainers leave it; payloads: (mode, step, metrics)."""
    content = {
        "config_hash": "0123456789abcdef",
        "trainer_variant": "stage2_rollout_aligned",
        "swift": {},
        "derived": {"total_steps": 100, "metric_for_best_model": "rollout/f1", "greater_is_better": True},
        **resolved,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "resolved_config.json").write_text(json.dumps(content))
    sink = MetricsSink(folder, meta={"config_hash": "0123456789abcdef"})
    for mode, step, metrics in payloads:
        sink.write(build_payload(mode, step, metrics))
        write_stats(folder, build_payload("train", step, {}))
    moment = time.time() - age
    os.utime(sink.metrics_path, (moment, moment))
    for step in checkpoints:
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "adapter_model.safetensors").touch()
    return folder


HEALTHY = [
    ("train", 10, {"loss": 1.0, "rollout/parse_truncated_rate": 0.1, "train_speed(s/it)": 60.0}),
    ("eval", 10, {"eval_rollout/f1": 0.6}),
    ("train", 20, {"loss": 0.9, "rollout/parse_truncated_rate": 0.1, "train_speed(s/it)": 60.0}),
    ("eval", 20, {"eval_rollout/f1": 0.55}),
]


def test_a_healthy_run(tmp_path, capsys):
    run = write_run(tmp_path / "run", HEALTHY, checkpoints=[10], age=60)
    assert main(["doctor", str(run)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        f"{run}: stage2_rollout_aligned, config 0123456789ab, step 20 of 100, last number 1.0 min ago",
        "No problem found.",
    ]


def test_a_run_with_problems_exits_with_1_and_numbers_them(tmp_path, capsys):
    bad = [*HEALTHY, ("train", 30, {"rollout/parse_truncated_rate": 0.8})]
    assert main(["doctor", str(write_run(tmp_path / "run", bad, checkpoints=[20]))]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(
        "1. the best evaluation (eval_rollout/f1 = 0.6000 at step 10) has no checkpoint"
    )
    assert "kept: checkpoint-20." in lines[1]
    assert lines[2].startswith("2. step 30: rollout/parse_truncated_rate = 0.8 (above 0.5)")
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("age", "stopped"),
    [(599, False), (2900, False), (3100, True)],  # it logs every 10 steps of 60 s: five intervals are 3000 s
)
def test_a_run_has_stopped_when_it_is_silent_for_long(tmp_path, age, stopped):
    found = diagnose(write_run(tmp_path / "run", HEALTHY, checkpoints=[10], age=age))
    assert [text[:19] for text in found.problems] == ["the run has stopped"] * stopped


@pytest.mark.parametrize("last", [("train", 100, {"loss": 0.1}), ("train", 60, {"train_runtime": 900.0})])
def test_a_finished_run_has_not_stopped(tmp_path, last):
    run = write_run(tmp_path / "run", [*HEALTHY, last], checkpoints=[10], age=1e6)
    found = diagnose(run)
    assert found.problems == []
    assert found.summary.endswith("finished")


def test_the_direction_of_the_best_metric(tmp_path):
    losses = [
        ("eval", 10, {"eval_loss": 1.0}),
        ("eval", 20, {"eval_loss": 2.0}),
        ("train", 100, {"loss": 1.0}),
    ]
    smallest = {"total_steps": 100, "metric_for_best_model": "loss", "greater_is_better": False}
    assert diagnose(write_run(tmp_path / "run", losses, checkpoints=[10], derived=smallest)).problems == []
    (problem,) = diagnose(write_run(tmp_path / "other", losses, checkpoints=[20], derived=smallest)).problems
    assert "eval_loss = 1.0000 at step 10" in problem


def test_a_run_that_keeps_no_checkpoint_needs_no_best_one(tmp_path):
    assert diagnose(write_run(tmp_path / "run", HEALTHY, derived={"total_steps": 100})).problems == []


def test_a_silent_model_has_no_best_checkpoint(tmp_path):
    """Precision is 1 by convention where nothing was predicted."""
    by_precision = {
        "total_steps": 20,
        "metric_for_best_model": "rollout/precision",
        "greater_is_better": True,
    }
    silent = ("eval", 10, {"eval_rollout/precision": 1.0, "eval_rollout/pred_objects": 0.0})
    spoke = ("eval", 20, {"eval_rollout/precision": 0.4, "eval_rollout/pred_objects": 5.0})
    run = write_run(tmp_path / "run", [silent, spoke], checkpoints=[20], derived=by_precision)
    assert diagnose(run).problems == []
    never = write_run(tmp_path / "never", [silent, ("train", 20, {"loss": 1.0})], derived=by_precision)
    (problem,) = diagnose(never).problems
    assert problem.startswith("no evaluation could pick the best checkpoint by eval_rollout/precision")


def test_a_checkpoint_without_weights_and_one_on_its_way(tmp_path):
    run = write_run(tmp_path / "run", HEALTHY)
    (run / "checkpoint-10").mkdir()
    assert "holds no weights" in diagnose(run).problems[0]
    just_evaluated = write_run(tmp_path / "new", HEALTHY[:2])
    assert diagnose(just_evaluated).problems == []


def test_the_audit_is_named_where_two_places_may_disagree(tmp_path):
    bad = [("train", 10, {"rollout/excluded_rate": 0.5, "rollout/parse_truncated_rate": 0.9})]
    run = write_run(tmp_path / "run", bad, checkpoints=[9, 10], swift={"dataset": ["data/train.jsonl"]})
    problems = {problem.split()[2]: problem for problem in diagnose(run).problems if "step 10" in problem}
    assert problems["rollout/excluded_rate"].endswith(
        f" `coordexp audit {run}/checkpoint-10 data/train.jsonl` tells whether prompts, pixels, targets and weights "
        "agree everywhere."
    )
    assert "audit" not in problems["rollout/parse_truncated_rate"]
    bare = write_run(tmp_path / "bare", [("train", 10, {"rollout/sample_valid_pred_rate": 0.1})])
    assert any(
        "`coordexp audit RUN_FILE TRAIN.jsonl` tells" in problem for problem in diagnose(bare).problems
    )


def test_not_finite_numbers_are_counted_over_the_whole_run(tmp_path):
    early = [
        ("train", 1, {"health/nonfinite_metrics_total": 2.0}),
        ("train", 2, {"health/nonfinite_metrics_total": 1}),
    ]
    quiet = [("train", step, {"loss": 1.0}) for step in range(3, 9)]
    (problem,) = diagnose(write_run(tmp_path / "run", early + quiet)).problems
    assert problem.startswith(
        "health/nonfinite_metrics_total: 3 over the run, first at step 1, last at step 2."
    )


def test_replaced_samples_are_counted_over_the_whole_run(tmp_path):
    records = [("train", 1, {"health/samples_replaced_total": 1.0})]
    records += [("train", step, {"loss": 1.0}) for step in range(2, 9)]
    (problem,) = diagnose(write_run(tmp_path / "run", records)).problems
    assert problem.startswith(
        "health/samples_replaced_total: 1 over the run, first at step 1, last at step 1."
    )
    assert "set strict: true" in problem


def test_advice_is_about_the_last_windows_and_the_last_evaluation(tmp_path):
    def windows(bad_at):
        return [
            ("train", step, {"rollout/parse_truncated_rate": 0.9 if step == bad_at else 0.1})
            for step in range(1, 8)
        ]

    assert diagnose(write_run(tmp_path / "old", windows(4))).problems == []
    assert len(diagnose(write_run(tmp_path / "new", windows(5))).problems) == 1
    fallen = [("eval", 1, {"eval_rollout/f1": 0.9}), ("eval", 2, {"eval_rollout/f1": 0.5}), *windows(0)]
    (problem,) = diagnose(write_run(tmp_path / "fallen", fallen, checkpoints=[1])).problems
    assert problem.startswith("step 2: eval_rollout/f1 = 0.500 fell by 0.400 from its best 0.900")


def test_a_last_payload_that_is_behind(tmp_path):
    run = write_run(tmp_path / "run", HEALTHY, checkpoints=[10])
    (run / "stats.json").write_text(json.dumps(build_payload("train", 10, {})))
    (problem,) = diagnose(run).problems
    assert problem.startswith("stats.json is at step 10, metrics.jsonl at step 20")
    (run / "stats.json").write_text(json.dumps(build_payload("train", 25, {})))
    assert diagnose(run).problems == []  # it is written at every step, records at some
    (run / "stats.json").write_text("{")
    assert "missing or broken" in diagnose(run).problems[0]


def test_a_run_that_never_logged(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "resolved_config.json").write_text('{"trainer_variant": "stage1_coord"}')
    assert "has logged nothing" in diagnose(run).problems[0]


@pytest.mark.parametrize("case", ["no folder", "no run", "not json", "not a payload"])
def test_bad_input_exits_with_2(tmp_path, capsys, case):
    run = tmp_path / "run"
    if case != "no folder":
        write_run(run / "v0-first" if case == "no run" else run, HEALTHY)
    if case == "not json":
        (run / "resolved_config.json").write_text("{")
    if case == "not a payload":
        (run / "metrics.jsonl").write_text('{"mode": "train"}\n')
    assert main(["doctor", str(run)]) == 2
    expected = {
        "no folder": "expected the output folder of a run",
        "no run": "Runs below it: " + str(run / "v0-first"),
        "not json": "resolved_config.json:1: not valid JSON",
        "not a payload": "metrics.jsonl:1: metrics payload: schema_version is missing",
    }
    assert expected[case] in capsys.readouterr().err
