"""The doctor's reading of a run folder: records, checkpoints, ranks, and what is missing."""

from __future__ import annotations

import io
import json
import os
import time

import pytest
from rich.console import Console
from rich.text import Text

from coordexp.cli.main import main
from coordexp.config.schema.telemetry import Telemetry
from coordexp.files import write_json
from coordexp.metrics.payload import build_payload
from coordexp.metrics.sinks import MetricsSink, write_stats
from coordexp.telemetry.doctor.diagnose import Doctor, diagnose
from coordexp.telemetry.doctor.view import render
from coordexp.telemetry.life.beats import FAILED, STOPPED, TRAINED, RankBeat, RankEnd, beat_file


def problems_of(run, **now):
    """What is wrong with a run, as text."""
    return [str(problem) for problem in diagnose(run, **now).problems]


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
    summary, verdict = capsys.readouterr().out.splitlines()
    head, ago, age = summary.partition(", last number ")
    assert head == f"{run}: stage2_rollout_aligned, config 0123456789ab, step 20 of 100"
    assert (ago, age.split()[1:], verdict) == (", last number ", ["min", "ago"], "No problem found.")


def test_a_run_with_problems_exits_with_1_and_numbers_them(tmp_path, capsys):
    bad = [*HEALTHY, ("train", 30, {"rollout/parse_truncated_rate": 0.8})]
    assert main(["doctor", str(write_run(tmp_path / "run", bad, checkpoints=[20]))]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(
        "1. the best evaluation (eval_rollout/f1 = 0.6000 at step 10) has no checkpoint"
    )
    assert "kept: checkpoint-20." in lines[1]
    assert lines[2].startswith("2. step 30: rollout/parse_truncated_rate = 0.8 (> 0.5)")
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("age", "stopped"),
    [(599, False), (2900, False), (3100, True)],  # it logs every 10 steps of 60 s: five intervals are 3000 s
)
def test_a_run_has_stopped_when_it_is_silent_for_long(tmp_path, age, stopped):
    problems = problems_of(write_run(tmp_path / "run", HEALTHY, checkpoints=[10], age=age))
    assert [text[:19] for text in problems] == ["the run has stopped"] * stopped


@pytest.mark.parametrize("last", [("train", 100, {"loss": 0.1}), ("train", 60, {"train_runtime": 900.0})])
def test_a_finished_run_has_not_stopped(tmp_path, last):
    run = write_run(tmp_path / "run", [*HEALTHY, last], checkpoints=[10], age=1e6)
    found = diagnose(run)
    assert found.problems == ()
    assert found.summary.endswith("finished")


def test_the_direction_of_the_best_metric(tmp_path):
    losses = [
        ("eval", 10, {"eval_loss": 1.0}),
        ("eval", 20, {"eval_loss": 2.0}),
        ("train", 100, {"loss": 1.0}),
    ]
    smallest = {"total_steps": 100, "metric_for_best_model": "loss", "greater_is_better": False}
    assert problems_of(write_run(tmp_path / "run", losses, checkpoints=[10], derived=smallest)) == []
    (problem,) = problems_of(write_run(tmp_path / "other", losses, checkpoints=[20], derived=smallest))
    assert "eval_loss = 1.0000 at step 10" in problem


def test_what_a_resume_undid_picks_no_best_checkpoint(tmp_path):
    """Killed after step 20, which was never saved; it went on from checkpoint-10 and found another step 20."""
    undone = [*HEALTHY[:3], ("eval", 20, {"eval_rollout/f1": 0.9})]
    again = [("train", 15, {"loss": 0.9}), *HEALTHY[2:], ("train", 30, {"loss": 0.8})]
    assert problems_of(write_run(tmp_path / "run", [*undone, *again], checkpoints=[10])) == []
    late = [("train", 15, {"loss": 0.9})]  # it has not come that far again
    assert problems_of(write_run(tmp_path / "late", [*undone, *late], checkpoints=[10])) == []


def test_a_run_that_keeps_no_checkpoint_needs_no_best_one(tmp_path):
    assert problems_of(write_run(tmp_path / "run", HEALTHY, derived={"total_steps": 100})) == []


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
    assert problems_of(run) == []
    never = write_run(tmp_path / "never", [silent, ("train", 20, {"loss": 1.0})], derived=by_precision)
    checkpoint, rule = problems_of(never)
    assert checkpoint.startswith("no evaluation could pick the best checkpoint by eval_rollout/precision")
    assert rule.startswith("step 10: eval_rollout/precision = 1 (>= 1 and eval_rollout/pred_objects == 0)")


def test_a_checkpoint_without_weights_and_one_on_its_way(tmp_path):
    run = write_run(tmp_path / "run", HEALTHY)
    (run / "checkpoint-10").mkdir()
    assert "holds no weights" in problems_of(run)[0]
    just_evaluated = write_run(tmp_path / "new", HEALTHY[:2])
    assert problems_of(just_evaluated) == []


def test_the_audit_is_named_where_two_places_may_disagree(tmp_path):
    bad = [("train", 10, {"rollout/excluded_rate": 0.5, "rollout/parse_truncated_rate": 0.9})]
    run = write_run(tmp_path / "run", bad, checkpoints=[9, 10], swift={"dataset": ["data/train.jsonl"]})
    problems = {problem.split()[2]: problem for problem in problems_of(run) if "step 10" in problem}
    assert problems["rollout/excluded_rate"].endswith(
        f" `coordexp audit {run}/checkpoint-10 data/train.jsonl` tells whether prompts, pixels, targets and weights "
        "agree everywhere."
    )
    assert "audit" not in problems["rollout/parse_truncated_rate"]
    bare = write_run(tmp_path / "bare", [("train", 10, {"rollout/sample_valid_pred_rate": 0.1})])
    assert any("`coordexp audit RUN_FILE TRAIN.jsonl` tells" in problem for problem in problems_of(bare))


def test_not_finite_numbers_are_counted_over_the_whole_run(tmp_path):
    early = [
        ("train", 1, {"health/nonfinite_metrics_total": 2.0}),
        ("train", 2, {"health/nonfinite_metrics_total": 1}),
    ]
    quiet = [("train", step, {"loss": 1.0}) for step in range(3, 9)]
    (problem,) = problems_of(write_run(tmp_path / "run", early + quiet))
    assert problem.startswith(
        "health/nonfinite_metrics_total: 3 over the run, first at step 1, last at step 2."
    )


def test_replaced_samples_are_counted_over_the_whole_run(tmp_path):
    records = [("train", 1, {"health/samples_replaced_total": 1.0})]
    records += [("train", step, {"loss": 1.0}) for step in range(2, 9)]
    (problem,) = problems_of(write_run(tmp_path / "run", records))
    assert problem.startswith(
        "health/samples_replaced_total: 1 over the run, first at step 1, last at step 1."
    )
    assert "set strict: true" in problem


def test_the_run_file_has_the_last_word_on_counts(tmp_path):
    records = [("train", step, {"health/oom_retries_total": 2.0}) for step in (1, 2)]
    silenced = {"silenced": ["oom_retries"]}
    assert problems_of(write_run(tmp_path / "silenced", records, telemetry=silenced)) == []
    mine = {"key": "health/oom_retries_total", "meaning": "m", "action": "a"}
    for name, condition, number in (("often", "> 5", 0), ("twice", "> 1", 1)):
        telemetry = {"rules": [{**mine, "name": "oom_retries", "condition": condition}]}
        found = diagnose(write_run(tmp_path / name, records, telemetry=telemetry))
        assert [problem.kind for problem in found.problems] == ["rule"] * number


def test_advice_is_about_the_last_windows_and_the_last_evaluation(tmp_path):
    def windows(bad_at):
        return [
            ("train", step, {"rollout/parse_truncated_rate": 0.9 if step == bad_at else 0.1})
            for step in range(1, 8)
        ]

    assert problems_of(write_run(tmp_path / "old", windows(4))) == []
    assert len(problems_of(write_run(tmp_path / "new", windows(5)))) == 1
    evaluations = [("eval", 1, {"eval_rollout/f1": 0.9}), ("eval", 2, {"eval_rollout/f1": 0.5})]
    fallen = sorted([*windows(0), *evaluations], key=lambda payload: payload[1])  # as a run writes them
    (problem,) = problems_of(write_run(tmp_path / "fallen", fallen, checkpoints=[1]))
    assert problem.startswith("step 2: eval_rollout/f1 = 0.5 (< best - 0.1): the model unlearns")


def test_a_last_payload_that_is_behind(tmp_path):
    run = write_run(tmp_path / "run", HEALTHY, checkpoints=[10])
    (run / "stats.json").write_text(json.dumps(build_payload("train", 10, {})))
    (problem,) = problems_of(run)
    assert problem.startswith("stats.json is at step 10, metrics.jsonl at step 20")
    (run / "stats.json").write_text(json.dumps(build_payload("train", 25, {})))
    assert problems_of(run) == []  # it is written at every step, records at some
    (run / "stats.json").write_text("{")
    assert "missing or broken" in problems_of(run)[0]


def test_an_evaluation_alone_leaves_no_stats(tmp_path):
    run = write_run(tmp_path / "run", [("eval", 0, {"eval_rollout/f1": 0.6})])
    (run / "stats.json").unlink()
    assert [told for told in problems_of(run) if "stats.json" in told] == []


def test_a_rule_of_another_version_is_named_with_its_file(tmp_path, capsys):
    rule = {"name": "own", "key": "loss", "condition": "> 3 x median", "meaning": "m", "action": "a"}
    run = write_run(tmp_path / "run", HEALTHY, checkpoints=[10], telemetry={"rules": [rule]})
    assert main(["doctor", str(run)]) == 2
    told = capsys.readouterr().err
    assert str(run / "resolved_config.json") in told
    assert "> 3 x median" in told


def test_a_run_that_never_logged(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "resolved_config.json").write_text('{"trainer_variant": "stage1_coord"}')
    assert "has logged nothing" in problems_of(run)[0]


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


# ranks

NOW = 10_000.0


def beat(rank, **fields):
    """A rank of two that trains and spoke five seconds ago."""
    fine = {"step": 20, "doing": "training", "time": NOW - 5, "step_time": NOW - 6}
    return RankBeat(rank=rank, world_size=2, host=f"node{rank}", pid=100 + rank, **{**fine, **fields})


def with_ranks(folder, *beats, payloads=HEALTHY, **more):
    run = write_run(folder, payloads, checkpoints=[10], **more)
    for one in beats:
        write_json(beat_file(run, one.rank), one.to_json())
    return run


RANK_CASES = {
    # what the ranks say: (them, how the run is, the beginning of each problem)
    "well": ([beat(0), beat(1)], "running", []),
    "one is dead": (
        [beat(0), beat(1, time=NOW - 300, step=19)],
        "running",
        ["rank 1 (node1, process 101) is dead: it said nothing for 5.0 min, after step 19, training."],
    ),
    "all are dead": (
        [beat(0, time=NOW - 61), beat(1, time=NOW - 61)],
        "silent",
        [
            "rank 0 (node0, process 100) is dead: it said nothing for 1.0 min",
            "rank 1 (node1, process 101) is dead",
        ],
    ),
    "one hangs": (
        [beat(0, step_time=NOW - 4000), beat(1, step=19, step_time=NOW - 4001)],
        "running",
        ["the run hangs: rank 1 (node1, process 101) is the furthest behind, 1.1 h in the step after 19."],
    ),
    "an evaluation takes long": (
        [beat(0, doing="between steps", step_time=NOW - 4000), beat(1, step_time=NOW - 4000)],
        "running",
        [],
    ),
    "one is slow": (
        [beat(0, busy_s=0.2), beat(1, busy_s=0.9)],
        "running",
        ["the others wait for rank 1 (node1, process 101): it is busy for 0.9 s of a step, they for 0.2 s."],
    ),
    "one is a little slower": ([beat(0, busy_s=0.01), beat(1, busy_s=0.05)], "running", []),
    "one never came": ([beat(0)], "running", ["rank 1 never came up."]),
    "one broke off": (
        [
            beat(0, time=NOW - 90, end=RankEnd(FAILED, "signal SIGTERM")),
            beat(1, time=NOW - 99, step=19, end=RankEnd(FAILED, "RuntimeError: no memory", "stack")),
        ],
        "broken off",
        [
            "rank 1 (node1, process 101) broke off at step 19, training: RuntimeError: no memory (then rank 0)."
        ],
    ),
    "a rule stopped it": (
        [beat(rank, end=RankEnd(STOPPED, "mine")) for rank in (0, 1)],
        "stopped by the rule mine",
        [],
    ),
    "trained": ([beat(rank, time=0.0, end=RankEnd(TRAINED)) for rank in (0, 1)], "finished", []),
}


@pytest.mark.parametrize("case", RANK_CASES)
def test_ranks_that_are_dead_hang_or_are_slow_are_named(tmp_path, case):
    beats, state, problems = RANK_CASES[case]
    found = diagnose(with_ranks(tmp_path / "run", *beats), now=NOW)
    assert found.state == state
    assert [
        str(problem)[: len(text)] for problem, text in zip(found.problems, problems, strict=True)
    ] == problems


@pytest.mark.parametrize(
    "last",
    [
        [
            ("train", 100, {"loss": 0.1}),
            ("eval", 100, {"eval_rollout/f1": 0.7}),
        ],  # the last step is not saved yet
        [("train", 60, {"train_runtime": 900.0})],  # it goes on from a run that was finished
    ],
)
def test_a_run_whose_ranks_live_is_not_finished(tmp_path, last):
    run = with_ranks(tmp_path / "run", beat(0), beat(1), payloads=[*HEALTHY, *last])
    found = diagnose(run, now=NOW)
    assert (found.state, found.is_over, found.problems) == ("running", False, ())


def test_a_run_that_just_started_has_no_problem(tmp_path):
    run = with_ranks(tmp_path / "run", beat(0, step=0), beat(1, step=0), payloads=())
    (run / "stats.json").unlink(missing_ok=True)
    found = diagnose(run, now=NOW)
    assert (found.state, found.problems, found.is_over) == ("starting", (), False)


# what is left of a run that died in its first minute

LOG = """\
======== attempt 1 · then
ValueError: of the first attempt
======== attempt 2 · now
loading
  File "x.py", line 1
torch.OutOfMemoryError: no memory for the model
[rank 1] later
"""


def test_a_run_that_died_before_its_settings_were_resolved(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.log").write_text(LOG)
    assert main(["doctor", str(run)]) == 1
    first, problem = capsys.readouterr().out.splitlines()
    assert first == f"{run}: unknown variant, config unknown, step 0"
    assert problem.startswith(
        "1. resolved_config.json is missing, so the run ended before its trainer was set up (missing too: "
        "metrics.jsonl, stats.json, ranks). Its last error: torch.OutOfMemoryError: no memory for the model What to do"
    )


def test_a_run_that_died_before_its_first_record(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "resolved_config.json").write_text('{"trainer_variant": "stage1_coord"}')
    (run / "run.log").write_text("coordexp: the server does not answer\n")
    (problem,) = problems_of(run)
    assert problem.startswith(
        "the run has logged nothing (missing files: metrics.jsonl, stats.json, ranks). Its last error: coordexp: the "
        "server does not answer"
    )


# programs and people


def test_json_says_the_same(tmp_path, capsys):
    bad = [*HEALTHY, ("train", 30, {"rollout/parse_truncated_rate": 0.8})]
    run = with_ranks(tmp_path / "run", beat(0), beat(1, time=0.0), payloads=bad)
    assert main(["doctor", str(run), "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert (content["run"], content["step"], content["total_steps"]) == (str(run), 30, 100)
    assert [problem["kind"] for problem in content["problems"]] == ["rank", "rank", "rule"]
    rule = content["problems"][-1]
    assert (rule["rule"], rule["key"], rule["value"], rule["step"]) == (
        "truncated",
        "rollout/parse_truncated_rate",
        0.8,
        30,
    )
    assert [one["rank"] for one in content["ranks"]] == [0, 1]
    assert content["last"]["train"]["global_step"] == 30
    assert content["missing_files"] == ["run.log"]


def test_rules_of_the_run_itself_are_judged(tmp_path):
    mine = {"name": "mine", "key": "loss", "condition": "< 1", "meaning": "it is low", "action": "raise it"}
    telemetry = Telemetry.model_validate({"rules": [mine], "silenced": ["truncated"]}).model_dump()
    bad = [*HEALTHY, ("train", 30, {"loss": 0.5, "rollout/parse_truncated_rate": 0.8})]
    run = write_run(tmp_path / "run", bad, checkpoints=[10], telemetry=telemetry)
    assert problems_of(run) == ["step 30: loss = 0.5 (< 1): it is low. What to do: raise it."]


def test_a_doctor_reads_on_where_it_stopped(tmp_path):
    run = write_run(tmp_path / "run", HEALTHY[:2], checkpoints=[10])
    doctor = Doctor(run)
    assert doctor.diagnose().step == 10
    with (run / "metrics.jsonl").open("a") as stream:
        line = json.dumps(build_payload("train", 30, {"rollout/parse_truncated_rate": 0.8}))
        stream.write(line[:20])
        stream.flush()
        assert doctor.diagnose().step == 10  # half a line
        stream.write(line[20:] + "\n")
    found, fresh = doctor.diagnose(), diagnose(run)
    assert found.step == 30
    assert [str(problem) for problem in found.problems] == [str(problem) for problem in fresh.problems]


def test_the_live_view_marks_what_leaves_its_range(tmp_path):
    bad = [
        ("train", 30, {"loss": 0.5, "rollout/parse_truncated_rate": 0.8, "rollout/duplicate_rate_mean": 0.05})
    ]
    run = with_ranks(tmp_path / "run", beat(0, busy_s=0.25), beat(1), payloads=bad)
    console = Console(record=True, width=160, force_terminal=True, file=io.StringIO())
    console.print(render(diagnose(run, now=NOW)))
    shown = console.export_text(styles=True)
    text = Text.from_ansi(shown).plain
    assert "rollout/parse_truncated_rate" in text
    assert "<= 0.1" in text
    assert "\x1b[1;31m0.8" in shown  # bold red
    assert "\x1b[1;31m0.05" not in shown
    assert "node1" in text
    assert "1. step 30: rollout/parse_truncated_rate = 0.8" in text


def test_watch_ends_with_the_run(tmp_path, capsys):
    run = with_ranks(tmp_path / "run", *(beat(rank, end=RankEnd(TRAINED)) for rank in (0, 1)))
    assert main(["doctor", str(run), "--every", "1"]) == 2
    assert "has no effect without --watch" in capsys.readouterr().err
    assert main(["doctor", str(run), "--watch", "--every", "1"]) == 0
    assert "No problem found." in capsys.readouterr().out
