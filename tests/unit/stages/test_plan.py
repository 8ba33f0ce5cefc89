"""Stages files: what they resolve to, and every mistake in them with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordexp.cli.main import main
from coordexp.control.acceptance import Criterion, OnFail, Reference
from coordexp.errors import ConfigError
from coordexp.stages.plan import load_stages, start_words

RUN = """\
model: base
dataset: [train.jsonl]
val_dataset: [val.jsonl]
tuner_type: {tuner}
external_plugins: [coordexp/plugin.py]
custom_trainer_variant: stage1_coord
max_steps: 9
output_dir: elsewhere
"""
GOOD = """\
output_dir: runs/all
stages:
  - name: one
    run: run.yaml
    accept:
      - {metric: eval_loss, op: "<", value: 2, window: 2, by_step: 9, on_fail: back_to_best}
  - name: two
    run: run.yaml
    overrides: {max_steps: 4, custom.head: plain, report_to: [none]}
    start_from: {stage: one}
"""


def written(tmp_path: Path, text: str, tuner: str = "full") -> Path:
    (tmp_path / "run.yaml").write_text(RUN.format(tuner=tuner))
    (tmp_path / "quiet.yaml").write_text(
        RUN.format(tuner=tuner) + "save_strategy: 'no'\neval_strategy: 'no'\n"
    )
    path = tmp_path / "stages.yaml"
    path.write_text(text)
    return path


def test_stages_are_run_files_with_overrides_each_in_a_folder_of_its_own(tmp_path):
    path = written(tmp_path, GOOD)
    one, two = load_stages(path).stages
    assert one.criteria == (Criterion("eval_loss", "<", 2.0, 2, 9, OnFail.BACK_TO_BEST),)
    assert (one.config.swift["max_steps"], two.config.swift["max_steps"]) == (9, 4)
    assert (one.config.custom.head, two.config.custom.head) == ("auto", "plain")
    assert two.config.swift["report_to"] == ["none"]
    assert [stage.config.swift["output_dir"] for stage in (one, two)] == ["runs/all/one", "runs/all/two"]
    assert (one.start, two.start) == (None, ("one", "best"))
    assert two.config.swift["model"] == "runs/all/one/best"
    assert (one.log, two.config.swift["add_version"]) == (Path("runs/all/one.log"), False)


def test_an_adapter_is_trained_on_as_an_adapter(tmp_path):
    _, two = load_stages(written(tmp_path, GOOD, tuner="lora")).stages
    assert (two.config.swift["model"], two.config.swift["adapters"]) == ("base", ["runs/all/one/best"])
    words = start_words(two, "runs/all/one/checkpoint-3", "base")
    assert words == ["--model", "base", "--adapters", "runs/all/one/checkpoint-3"]
    one = load_stages(written(tmp_path, GOOD)).stages[0]
    with pytest.raises(ConfigError, match=r"coordexp model merge"):
        start_words(one, "checkpoint-3", "base")


def test_a_stage_that_stops_when_accepted_hands_its_criteria_to_the_training(tmp_path):
    enough = GOOD.replace(", window: 2, by_step: 9", "").replace(
        "    accept:", "    stop_when_accepted: true\n    accept:"
    )
    one, two = load_stages(written(tmp_path, enough)).stages
    assert [goal.model_dump() for goal in one.config.sections.training.stop_when] == [
        {"metric": "eval_loss", "op": "<", "value": 2.0}
    ]
    assert two.config.sections.training.stop_when == []


OF = (
    GOOD
    + """\
    accept:
      - {metric: eval_loss, op: "<=", value: 0.9, of: {stage: one}}
      - {metric: eval_loss, op: "<", value: 1, of: {stage: one, metric: eval_token_acc, at: best}}
      - {metric: eval_loss, op: "<", value: 2, of: {metric: eval_token_acc}}
"""
)


def test_a_criterion_may_compare_with_another_number(tmp_path):
    _, two = load_stages(written(tmp_path, OF)).stages
    assert [one.of for one in two.criteria] == [
        Reference("eval_loss", "one"),
        Reference("eval_token_acc", "one", "best"),
        Reference("eval_token_acc"),
    ]
    assert str(two.criteria[0]) == "eval_loss <= 0.9 x eval_loss of stage one"


OF_MISTAKES = [
    ("of: {stage: one}", "of: {stage: oen}", r"stages\[1\].accept\[0\].of.stage = .oen. in .*:12: .*did you mean one"),
    ("of: {stage: one}", "of: {stage: two}", r"of.stage = .two. .*no earlier stage has this name; there are one"),
    ("of: {stage: one}", "of: {stage: one, metric: eval_los}", r"accept\[0\].of.metric = .eval_los. .*of stage one: .*"
     "did you mean eval_loss"),
    ("of: {stage: one}", "of: {stage: one, metric: eval_rollout/f1}", r"of.metric = .eval_rollout/f1. .*of stage one: "
     "the evaluation of trainer variant stage1_coord"),
    ("metric: eval_token_acc, at", "metric: loss, at", r"accept\[1\].of.at = .best. .*no evaluation of a best"),
    ("of: {metric: eval_token_acc}", "of: {metric: eval_loss}", r"accept\[2\].of .*compares a number with itself"),
    ("of: {stage: one}", "of: {}", r"accept\[0\].of .*compares a number with itself"),
    ("of: {stage: one}", "of: {stages: one}", r"accept\[0\].of.stages .*did you mean"),
    ("of: {stage: one}", "of: {stage: one, at: end}", r"accept\[0\].of.at = .end. .*expected"),
    ("run: run.yaml\n    accept", "run: quiet.yaml\n    accept", r"of stage one: the stage has no evaluation"),
    ("    accept:\n      - {metric: eval_loss, op: \"<=\"", "    stop_when_accepted: true\n    accept:\n      - "
     "{metric: eval_loss, op: \"<=\"", r"stages\[1\].stop_when_accepted .*accept\[0\] is not met by one .*no `of`"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "said"), OF_MISTAKES)
def test_a_mistake_in_what_is_compared_is_named_with_its_place(tmp_path, old, new, said):
    assert old in OF
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        load_stages(written(tmp_path, OF.replace(old, new, 1)))


def test_a_stage_that_comes_later_is_nothing_to_compare_with(tmp_path):
    of = GOOD.replace("value: 2, window: 2, by_step: 9, on_fail: back_to_best", "value: 1, of: {stage: two}")
    with pytest.raises(ConfigError, match=r"(?s)stages\[0\].accept\[0\].of.stage = .two. .*it is the first"):
        load_stages(written(tmp_path, of))


MISTAKES = [
    ("accept:", "stop_when_accepted: true\n    accept:", r"stop_when_accepted .*accept\[0\] is not met by one"),
    ("start_from", "stop_when_accepted: true\n    start_from", r"stages\[1\].stop_when_accepted .*`accept` is empty"),
    ("name: two", "name: one", r"stages\[1\].name = .one. in .*stages.yaml:7: another stage has this name"),
    ("stage: one", "stage: oen", r"stages\[1\].start_from.stage = .oen. in .*:10: .*did you mean one"),
    ("eval_loss", "eval_los", r"stages\[0\].accept\[0\].metric = .eval_los. in .*:6: .*did you mean eval_loss"),
    ("eval_loss", "eval_rollout/f1", r"metric = .eval_rollout/f1. .*the evaluation of trainer variant stage1_coord"),
    ('op: "<"', 'op: "="', r"stages\[0\].accept\[0\].op = .=. in .*:6: expected one of >=, >, <=, <"),
    ("window: 2", "window: 0", r"stages\[0\].accept\[0\].window = 0 in .*:6: expected greater than or equal to 1"),
    ("value: 2,", "", r"stages\[0\].accept\[0\].value in .*: is missing"),
    ("on_fail: back_to_best", "on_fail: back", r"on_fail = .back. .*did you mean .back_to_best."),
    ("overrides:", "override:", r"stages\[1\].override in .*:9: unknown key; did you mean stages\[1\].overrides"),
    ("max_steps: 4", "max_step: 4", r"stages\[1\] \(two\) in .*stages.yaml:7: .*run.yaml: max_step .*max_steps"),
    ("run: run.yaml", "run: runn.yaml", r"stages\[0\] \(one\) in .*:3: .*runn.yaml: no such file"),
    ("run: run.yaml\n    accept", "run: quiet.yaml\n    accept", r"eval_loss.*the stage has no evaluation"),
    ("run: run.yaml\n    accept", "run: quiet.yaml\n    accept", r"start_from.checkpoint .*no best checkpoint"),
    ("run: run.yaml\n    accept", "run: quiet.yaml\n    accept", r"on_fail = .back_to_best. .*no best checkpoint"),
    ("name: two", "name: ../two", r"stages\[1\].name = .*\.\./two"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "said"), MISTAKES)
def test_a_mistake_is_named_with_its_place(tmp_path, old, new, said):
    path = written(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        load_stages(path)


def test_config_check_looks_at_the_runs_of_all_stages(tmp_path, capsys):
    path = written(tmp_path, GOOD)
    assert main(["config", "check", str(path)]) == 0
    assert "does not exist" in capsys.readouterr().err  # of the data, once, and nothing of runs/all/one/best
    assert main(["config", "check", "--paths", str(path)]) == 2
    said = capsys.readouterr().err
    assert 'dataset = "train.jsonl"' in said
    assert "runs/all/one" not in said
    path.write_text(GOOD.replace("custom.head: plain", "custom.head: plan"))
    assert main(["config", "check", str(path)]) == 2
    assert "did you mean" in capsys.readouterr().err
