"""What a run leaves in stats.json at every step, and how its console goes on after a resume."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import TrainerControl, TrainerState

from coordexp.config.schema.telemetry import ConsoleLevels
from coordexp.metrics.payload import build_payload
from coordexp.metrics.sinks import MetricsSink
from coordexp.telemetry.console.view import ConsoleView
from coordexp.trainers.logs.console import RunConsole
from coordexp.trainers.logs.stats import StatsFile

VIEW = ConsoleView(ConsoleLevels(), max_steps=40, best_metric="rollout/f1")


def test_stats_are_of_the_last_step_also_between_records(tmp_path: Path):
    stats, state = StatsFile(tmp_path), TrainerState(max_steps=40, is_world_process_zero=True)
    stats.on_train_begin(None, state, TrainerControl())
    seen = []
    for step in (1, 2, 3):
        state.global_step, stats.loss = step, 1.0 / step
        stats.on_step_end(None, state, TrainerControl())
        if step == 2:
            stats.note("train", step)
        found = json.loads((tmp_path / "stats.json").read_text())
        seen.append((found["global_step"], found["metrics"]["loss"], found["recorded"]))
    assert seen == [(1, 1.0, {}), (2, 0.5, {"train": 2}), (3, 1.0 / 3, {"train": 2})]


def test_another_rank_writes_nothing(tmp_path: Path):
    stats, state = StatsFile(tmp_path), TrainerState(global_step=1, max_steps=40, is_world_process_zero=False)
    stats.on_train_begin(None, state, TrainerControl())
    stats.on_step_end(None, state, TrainerControl())
    stats.note("train", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_console_knows_the_evaluations_up_to_its_checkpoint(tmp_path: Path):
    sink = MetricsSink(tmp_path, meta={"config_hash": "a"})
    for step, f1 in ((10, 0.5), (20, 0.25), (30, 0.75)):  # 30 lies after the checkpoint of step 20
        sink.write(build_payload("train", step, {"loss": 1.0}))
        sink.write(build_payload("eval", step, {"eval_rollout/f1": f1}))
    said: list[str] = []
    console = RunConsole(said.append, colours=False)
    console.resume(tmp_path, 20)
    console.show(build_payload("train", 22, {"loss": 2.0}), VIEW, None)
    console.show(build_payload("eval", 30, {"eval_rollout/f1": 0.625}), VIEW, None)
    assert said == [
        "step 22/40 · loss 2",
        "eval at step 30/40 · F1 0.625\n"
        "  since step 20: [F1+]\n"
        "  better: rollout/f1 0.25 -> 0.625\n"
        "  since the best, step 10: [F1+]\n"
        "  [BEST] rollout/f1 0.625, best before 0.5 at step 10",
    ]
