"""Rules on the records of a run that trains, and the end that one asks for."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from coordexp.config import exit_code, parse_sections
from coordexp.config.schema.telemetry import Telemetry
from coordexp.errors import ConfigError
from coordexp.metrics.keys_run import PHASES, TIME_SHARES, TIME_STEP
from coordexp.telemetry.life.beats import FAILED, TRAINED, read_beats
from coordexp.trainers.base import CoordTrainer
from coordexp.trainers.step.pace import busy_seconds
from coordexp.trainers.watch.records import RecordWatch
from coordexp.trainers.watch.run import RunWatch
from coordexp.trainers.watch.stop import StopOnRule, StoppedByRuleError

MINE = {"name": "mine", "key": "loss", "condition": "> 9", "for_records": 2, "meaning": "m", "action": "a"}
SETTINGS = Telemetry.model_validate({"rules": [MINE], "stop_on": ["oom_retries", "mine"]})


def rules_of(findings):
    return [finding.rule for finding in findings]


def test_a_rule_asks_for_the_end_by_its_place_and_goes_on_asking():
    watch = RecordWatch(SETTINGS, "stage1_coord", 100)
    asked = []
    for step, loss in enumerate([10, 10, 1, 10], start=1):
        watch.look(step, {"loss": loss})
        asked.append(watch.asks_to_stop)
    assert asked == [0, 2, 2, 2]


def test_a_finding_holds_until_its_number_is_well():
    watch = RecordWatch(SETTINGS, "stage1_coord", 100)
    assert rules_of(watch.look(1, {"health/oom_retries_total": 1})) == ["oom_retries"]
    assert rules_of(watch.look(2, {"health/oom_retries_total": 1})) == []  # said lately
    assert rules_of(watch.findings) == ["oom_retries"]
    watch.look(3, {"eval_loss": 1.0})
    assert rules_of(watch.findings) == ["oom_retries"]
    watch.look(4, {"health/oom_retries_total": 0})
    assert rules_of(watch.findings) == []


def test_a_resumed_watch_goes_on():
    first, second = (RecordWatch(SETTINGS, "stage1_coord", 100) for _ in range(2))
    first.look(1, {"loss": 10})
    second.restore(json.loads(json.dumps(first.state())))
    second.look(2, {"loss": 10})
    assert second.asks_to_stop == 2
    second.restore(None)
    assert rules_of(second.look(3, {"loss": 10})) == []  # said at step 2


def test_all_ranks_end_after_the_step_in_which_they_agreed():
    stop = StopOnRule(SETTINGS.stop_on)
    control = TrainerControl()
    stop.agree(0)
    stop.on_step_end(None, None, control)
    assert (control.should_save, control.should_training_stop, stop.rule) == (False, False, None)
    stop.raise_if_stopped(3)
    stop.agree(2)
    stop.agree(1)  # the first one counts
    stop.on_step_end(None, None, control)
    assert (control.should_save, control.should_training_stop, stop.rule) == (True, True, "mine")
    with pytest.raises(StoppedByRuleError, match="stopped after step 4 by the rule mine") as caught:
        stop.raise_if_stopped(4)
    assert caught.value.exit_code == 4


def test_seconds_in_which_a_rank_does_not_wait():
    def step(**seconds):
        total = sum(seconds.values())
        shares = {TIME_SHARES[phase]: (seconds.get(phase, 0.0), total) for phase in PHASES}
        return {TIME_STEP: (total, 1.0), **shares}

    steps = [step(data=1.0, forward=2.0, backward=7.0, other=9.0), step(generation=4.0, optimizer=1.0)]
    assert busy_seconds(steps) == 3.5
    assert busy_seconds([]) is None


@pytest.mark.parametrize("code", [4, None])
def test_the_exit_code_of_a_process_behind_a_launcher(code):
    leave = "" if code is None else f"from coordexp.config.exit_code import leave_exit_code as l; l({code})"
    with exit_code.asked_for() as (environment, told):
        subprocess.run(
            [sys.executable, "-c", leave], env=environment | {"PYTHONPATH": ":".join(sys.path)}, check=True
        )
        assert told() == code


class OnlyEvaluates(CoordTrainer):
    """What `custom.evaluate_only` needs of a trainer."""

    def __init__(self, run_dir, eval_dataset):
        sections = parse_sections({"custom": {"evaluate_only": 7}})
        self.settings = SimpleNamespace(sections=sections)
        self.args = SimpleNamespace(
            output_dir=run_dir, process_index=0, world_size=1, resume_from_checkpoint=None, save_strategy="no"
        )
        self.state, self.control = TrainerState(), TrainerControl()
        self.callback_handler = CallbackHandler([], None, None, None, None)
        self.accelerator, self.model = Accelerator(cpu=True), torch.nn.Linear(1, 1)
        self.eval_dataset, self.evaluated_at = eval_dataset, []
        self._watch = RunWatch(self.args, sections, "stage1_coord", {})

    def evaluate(self, *args, **kwargs):
        self.evaluated_at.append(self.state.global_step)


def test_a_run_that_only_evaluates_comes_to_its_end(tmp_path):
    trainer = OnlyEvaluates(tmp_path, ["a sample"])
    trainer.train()
    trainer._watch._life.stop()
    (beat,) = read_beats(tmp_path)
    assert (trainer.evaluated_at, beat.end.how) == ([7], TRAINED)
    assert not (tmp_path / "postmortem.json").exists()
    without = OnlyEvaluates(tmp_path, None)
    with pytest.raises(ConfigError, match="the run has no evaluation data"):
        without.train()
    without._watch._life.stop()
    (beat,) = read_beats(tmp_path)
    assert beat.end.how == FAILED
    assert beat.end.reason.startswith("ConfigError: custom.evaluate_only: the run has no evaluation data")
