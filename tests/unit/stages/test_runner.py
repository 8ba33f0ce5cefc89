"""Stages end to end with a trainer that takes half a second: gates, starts, what is not done again, kills."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import stage_programs
from support.stage_programs import step_of_weights

from coordexp.cli.main import main
from coordexp.errors import ConfigError
from coordexp.eval.report.verdicts import verdict_facts, write_verdicts
from coordexp.stages.plan import load_stages
from coordexp.stages.runner import StageError, StageRunner

START = np.array([1.0, -2.0])
STEPS = {"one": 4, "two": 3}
RUN = """\
model: {model}
dataset: [{data}]
val_dataset: [{data}]
tuner_type: full
external_plugins: [coordexp/plugin.py]
custom_trainer_variant: stage1_coord
learning_rate: 0.1
max_steps: 4
output_dir: elsewhere
"""
STAGES = """\
output_dir: {output}
verify_best: false
stages:
  - name: one
    run: run.yaml
    accept: [{first}]
  - name: two
    run: run.yaml
    overrides: {{max_steps: 3, learning_rate: 0.05}}
    start_from: {{stage: one, checkpoint: {which}}}
    accept: [{{metric: eval_loss, op: "<", value: 3}}]
"""
PASSES = '{metric: eval_loss, op: "<", value: 4}'


@pytest.fixture
def stages(tmp_path: Path):
    """Writes a stages file beside a model. first: criterion of stage one.  which: checkpoint that stage two takes."""
    model = tmp_path / "model"
    model.mkdir()
    save_file({"w": START}, model / "model.safetensors")
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "run.yaml").write_text(RUN.format(model=model, data=tmp_path / "train.jsonl"))

    def write(first: str = PASSES, which: str = "last", output: str = "all") -> Path:
        path = tmp_path / "stages.yaml"
        path.write_text(STAGES.format(output=tmp_path / output, first=first, which=which))
        return path

    return write


def run(
    path: Path, said: list[str] | None = None, *, replaces: bool = False, anew_from: str | None = None
) -> dict[str, Any]:
    say = (lambda _text: None) if said is None else said.append
    runner = StageRunner(load_stages(path), say, train=stage_programs.train, replaces=replaces)
    return runner.run(anew_from=anew_from)


def weights_after(*stages: tuple[int, float]) -> np.ndarray:
    weights = START
    for steps, rate in stages:
        for _ in range(steps):
            weights = step_of_weights(weights, rate)
    return weights


def weights_of(checkpoint: Path) -> np.ndarray:
    return load_file(checkpoint / "model.safetensors")["w"]


def test_a_later_stage_starts_from_what_the_earlier_one_reached_and_nothing_is_done_twice(stages, tmp_path):
    path = stages()
    verdict = run(path)
    assert verdict["accepted"]
    assert [stage["outcome"] for stage in verdict["stages"]] == ["accepted", "accepted"]
    assert json.loads((tmp_path / "all" / "verdict.json").read_text()) == verdict
    last = tmp_path / "all" / "two" / "checkpoint-3"
    np.testing.assert_array_equal(weights_of(last), weights_after((4, 0.1), (3, 0.05)))
    assert (tmp_path / "all" / "two" / "best").resolve() == last.resolve()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "all").rglob("model.safetensors")}
    said: list[str] = []
    assert run(path, said) == verdict
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert "one: trained already" in said
    # the report
    facts = verdict_facts(last)
    assert facts["stage two"] == "accepted after step 3; best checkpoint: checkpoint-3"
    assert facts["eval_loss < 3"].startswith("met: ")
    assert main(["report", str(tmp_path / "all"), "--output", str(tmp_path / "report.html")]) == 0
    assert (tmp_path / "report.html").read_text().count('data-accepted="yes"') == 2
    # other settings are refused, unless it is said that they are meant
    path.write_text(path.read_text().replace("learning_rate: 0.05", "learning_rate: 0.01"))
    with pytest.raises(ConfigError, match=r"stage two was made from other settings.*--anew-from two"):
        run(path)
    assert run(path, anew_from="two")["accepted"]
    np.testing.assert_array_equal(weights_of(last), weights_after((4, 0.1), (3, 0.01)))
    # a step of the earlier stage, by its number
    path.write_text(path.read_text().replace("checkpoint: last", "checkpoint: 3"))
    assert run(path, replaces=True)["accepted"]
    np.testing.assert_array_equal(weights_of(last), weights_after((3, 0.1), (3, 0.01)))
    path.write_text(path.read_text().replace("checkpoint: 3", "checkpoint: 7"))
    with pytest.raises(StageError, match="stage two starts from the checkpoint `checkpoint-7` of stage one"):
        run(path)


def test_a_stage_is_held_against_what_an_earlier_one_reached(stages, tmp_path):
    """By the loss after the 4 steps of stage one, and after the 3 of stage two behind them."""
    one, two = (float(np.abs(weights_after((4, 0.1), (n, 0.05))).sum()) for n in (0, 3))
    path = stages()
    text = path.read_text()
    absolute = '{metric: eval_loss, op: "<", value: 3}'
    assert absolute in text
    for share, at, accepted in ((two / one + 0.001, "last", True), (two / one - 0.001, "best", False)):
        relative = f'{{metric: eval_loss, op: "<", value: {share}, of: {{stage: one, at: {at}}}}}'
        path.write_text(text.replace(absolute, relative))
        verdict = run(path)
        assert verdict["accepted"] is accepted
        (criterion,) = verdict["stages"][1]["criteria"]
        assert criterion["found"] == pytest.approx(two)
        assert criterion["of"] == {"metric": "eval_loss", "stage": "one", "at": at}
        assert criterion["reason"].endswith(f"{share:g} x {one:.6g} (step 4) = {share * one:.6g}")
        said: list[str] = []
        assert run(path, said) == verdict  # nothing is trained, and it is decided as before
        assert {"one: trained already", "two: trained already"} <= set(said)
    # as if step 3 had been the best one
    path_of_state = tmp_path / "all" / "one" / "checkpoint-4" / "trainer_state.json"
    path_of_state.write_text(json.dumps(json.loads(path_of_state.read_text()) | {"best_global_step": 3}))
    (criterion,) = run(path, replaces=True)["stages"][1]["criteria"]
    third = float(np.abs(weights_after((3, 0.1))).sum())
    assert f" x {third:.6g} (step 3) = " in criterion["reason"]


def test_a_stage_that_is_not_accepted_ends_it(stages, tmp_path):
    verdict = run(stages('{metric: eval_loss, op: "<", value: 0.1}'))
    assert not verdict["accepted"]
    assert [stage["outcome"] for stage in verdict["stages"]] == ["refused", "not_run"]
    assert not (tmp_path / "all" / "two").exists()
    (criterion,) = verdict["stages"][0]["criteria"]
    assert (criterion["passed"], criterion["step"]) == (False, 4)
    page = write_verdicts(tmp_path / "all", tmp_path / "report.html").read_text()
    assert page.count('data-accepted="no"') == 2
    # a gate that is let down needs no training
    said: list[str] = []
    assert run(stages(), said)["accepted"]
    assert "one: trained already" in said


@pytest.mark.parametrize(
    ("on_fail", "outcome", "steps"), [("warn", "warned", 4), ("back_to_best", "back_to_best", 2)]
)
def test_what_a_failed_criterion_leads_to(stages, tmp_path, on_fail, outcome, steps):
    path = stages(f'{{metric: eval_loss, op: "<", value: 0.1, on_fail: {on_fail}}}')
    run(path)
    one = tmp_path / "all" / "one"
    state = json.loads((one / "checkpoint-4" / "trainer_state.json").read_text())
    (one / "checkpoint-4" / "trainer_state.json").write_text(json.dumps({**state, "best_global_step": 2}))
    verdict = run(path, anew_from="two")
    assert verdict["accepted"]
    assert verdict["stages"][0]["outcome"] == outcome
    np.testing.assert_array_equal(
        weights_of(tmp_path / "all" / "two" / "checkpoint-3"), weights_after((steps, 0.1), (3, 0.05))
    )


def test_a_training_that_fails_is_told_with_its_exit_code(stages):
    path = stages()
    plan = load_stages(path)
    (path.parent / "model" / "model.safetensors").unlink()
    said: list[str] = []
    with pytest.raises(StageError, match="the training of stage one ended with exit status 1") as error:
        StageRunner(plan, said.append, train=stage_programs.train).run()
    assert error.value.exit_code == 1
    assert any("model.safetensors" in text for text in said)


def test_a_training_that_a_rule_ended_goes_on_and_one_that_ended_early_does_not(stages, tmp_path):
    """A rule ends a run with exit code 4; what ends well before its last step (early stopping) is done."""
    path, calls = stages(), list[int]()

    def ends_early(run_file: Path, words: list[str], log: Path, **options: Any) -> int:
        short = ["--max_steps", "2"] if not calls else []
        code = stage_programs.train(run_file, [*words, *short], log, **options)
        state = tmp_path / "all" / "one" / "checkpoint-2" / "trainer_state.json"
        state.write_text(json.dumps({**json.loads(state.read_text()), "max_steps": 4}))
        calls.append(codes[len(calls)] if len(calls) < len(codes) else code)
        return calls[-1]

    codes = [4]
    runner = StageRunner(load_stages(path), lambda _text: None, train=ends_early)
    with pytest.raises(StageError) as error:
        runner.run()
    assert error.value.exit_code == 4
    assert runner.run()["accepted"]
    last = tmp_path / "all" / "one" / "checkpoint-4"
    np.testing.assert_array_equal(weights_of(last), weights_after((4, 0.1)))
    calls.clear()
    codes = [0]
    verdict = StageRunner(load_stages(path), lambda _text: None, train=ends_early).run(anew_from="one")
    assert (verdict["accepted"], verdict["stages"][0]["last"]) == (True, "checkpoint-2")
    said: list[str] = []
    run(path, said)
    assert "one: trained already" in said


def test_a_folder_that_no_runner_made_is_left_alone(stages, tmp_path):
    kept = tmp_path / "all" / "one" / "thesis.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    for options in ({}, {"anew_from": "one"}):
        with pytest.raises(ConfigError, match="holds something that no `coordexp run` made"):
            run(stages(), **options)
    assert kept.read_text() == "mine"


@pytest.mark.parametrize("whole_group", [True, False], ids=["runner and training", "runner alone"])
def test_killed_at_five_moments_it_comes_to_the_same_end(stages, tmp_path, whole_group):
    expected = run(stages(output="undisturbed"))
    path = stages()
    command = [sys.executable, stage_programs.__file__, "run", str(path)]
    roots = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), str(Path(__file__).parents[2])])}
    moments = random.Random(0)
    for _ in range(5):
        before = progress(tmp_path / "all")
        env = {**os.environ, **roots, "STAGE_PAUSE_S": "0.02"}
        process = subprocess.Popen(command, env=env, start_new_session=True, stdout=subprocess.DEVNULL)
        while process.poll() is None and progress(tmp_path / "all") == before:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.15))
        os.killpg(process.pid, signal.SIGKILL) if whole_group else process.kill()
        process.wait()
    done = subprocess.run(command, env={**os.environ, **roots}, stdout=subprocess.DEVNULL, check=False)
    assert done.returncode == 0
    verdict = json.loads((tmp_path / "all" / "verdict.json").read_text())
    assert verdict["stages"] == expected["stages"]
    for name, steps in STEPS.items():
        ours, theirs = (
            folder / name / f"checkpoint-{steps}" for folder in (tmp_path / "all", tmp_path / "undisturbed")
        )
        np.testing.assert_array_equal(weights_of(ours), weights_of(theirs))


def progress(folder: Path) -> int:
    """Something that grows as stages go on: the size of all records, and checkpoints begun."""
    files = [*folder.glob("*/metrics.jsonl"), *folder.glob("*/checkpoint-*/*")]
    return sum(1 for _ in files) + sum(file.stat().st_size for file in folder.glob("*/metrics.jsonl"))
