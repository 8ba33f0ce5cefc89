"""What the folder of a cell says: how far it is, where it goes on, what it cost."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from coordexp.errors import ConfigError
from coordexp.models.checkpoints import resumable
from coordexp.study.records import (
    begin_training,
    chosen_checkpoint,
    identity_of,
    process_costs,
    read_record,
    training_numbers,
)


def checkpoint(folder: Path, step: int, state: str = "{}") -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"weight": np.zeros(1)}, path / "model.safetensors")
    (path / "optimizer.pt").touch()
    (path / "trainer_state.json").write_text(state)
    return path


def test_training_goes_on_at_the_last_checkpoint_that_is_whole(tmp_path):
    assert resumable(tmp_path) is None
    first = checkpoint(tmp_path, 90)
    checkpoint(tmp_path, 100, state='{"global_step": 10')  # cut short while it was written
    (tmp_path / "checkpoint-110").mkdir()
    assert resumable(tmp_path) == first
    last = checkpoint(tmp_path, 120)
    assert resumable(tmp_path) == last
    for one in (first, last):
        (one / "optimizer.pt").unlink()  # save_only_model
    assert resumable(tmp_path) is None


def test_checkpoints_are_chosen_by_step_or_as_the_last_or_the_best(tmp_path):
    early, late = checkpoint(tmp_path, 90), checkpoint(tmp_path, 100)
    (tmp_path / "best").symlink_to("checkpoint-90")
    assert chosen_checkpoint(tmp_path, "last") == late
    assert chosen_checkpoint(tmp_path, "best") == chosen_checkpoint(tmp_path, 90) == early
    with pytest.raises(ConfigError, match="no checkpoint 50; found checkpoint-90, checkpoint-100"):
        chosen_checkpoint(tmp_path, 50)


def test_another_training_removes_what_stood_there_and_the_same_keeps_it(tmp_path):
    folder = tmp_path / "cell"
    begin_training(folder, "a", {"steps": 1}, keep=False)
    checkpoint(folder, 1)
    begin_training(folder, "a", {"steps": 1}, keep=True)
    assert resumable(folder) is not None
    begin_training(folder, "b", {"steps": 2}, keep=False)
    assert resumable(folder) is None
    assert read_record(folder, "training.json") == {
        "identity": "b", "finished": False, "made_from": {"steps": 2},
    }  # fmt: skip


def test_identity_is_that_of_the_values_whatever_their_order():
    assert identity_of({"a": 1, "b": {"c": 2, "d": 3}}) == identity_of({"b": {"d": 3, "c": 2}, "a": 1})
    assert identity_of({"a": 1}) != identity_of({"a": 2})


def test_costs_of_steps_that_were_done_twice_count_once(tmp_path):
    """Seconds of a step are means over the steps since the last record."""
    rows = [(1, 1.0), (5, 0.5), (10, 0.4), (10, 0.6), (12, 0.2)]
    lines = [
        {"schema_version": 1, "mode": "train", "global_step": step, "metrics": {"time/step_s": seconds}}
        for step, seconds in rows
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert training_numbers(tmp_path)["train_s"] == pytest.approx(1.0 + 4 * 0.5 + 5 * 0.6 + 2 * 0.2)


def test_processes_that_left_no_end_are_named(tmp_path):
    lines = [
        {"phase": "train", "event": "begin"},
        {"phase": "train", "event": "begin"},
        {"phase": "train", "event": "end", "exit_code": 0, "wall_s": 3.0, "cpu_s": 2.0},
    ]
    (tmp_path / "attempts.jsonl").write_text("".join(json.dumps(line) + os.linesep for line in lines))
    assert process_costs(tmp_path)["train"] == {
        "wall_s": 3.0, "cpu_s": 2.0, "processes": 1, "is_whole": False, "cpu_share": 2 / 3,
    }  # fmt: skip
