"""What goes wrong with an upload is said, and does not end the run."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

from transformers import TrainerControl, TrainerState

from coordexp.swift_bridge.saving.uploads import say_failed_uploads
from coordexp.trainers.hub_uploads import HubUploads


def test_a_card_that_cannot_be_written_is_said(tmp_path: Path, caplog) -> None:
    (tmp_path / "checkpoint-3").mkdir()  # and no resolved_config.json
    args = SimpleNamespace(output_dir=str(tmp_path), hub_model_id="team/detector")
    state = TrainerState(global_step=3, is_world_process_zero=True)
    with caplog.at_level(logging.WARNING):
        HubUploads().on_push_begin(args, state, TrainerControl())
    assert "without a card" in caplog.text
    assert "resolved_config.json" in caplog.text
    assert not (tmp_path / "README.md").exists()


def test_an_upload_that_failed_beside_training_is_said_once(caplog) -> None:
    failed, done, running, cancelled = (Future() for _ in range(4))
    failed.set_exception(ValueError("the hub said 413"))
    done.set_result("a commit")
    cancelled.cancel()
    jobs = [failed, done, running, cancelled]
    for _ in range(2):
        say_failed_uploads(jobs)
    assert [record.message.count("(the hub said 413)") for record in caplog.records] == [1]
    assert jobs == [done, running, cancelled]
