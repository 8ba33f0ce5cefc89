"""A card that cannot be written does not end a run that is uploaded."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

from transformers import TrainerControl, TrainerState

from coordexp.trainers.hub_card import HubCard


def test_a_card_that_cannot_be_written_is_said(tmp_path: Path, caplog) -> None:
    (tmp_path / "checkpoint-3").mkdir()  # and no resolved_config.json
    args = SimpleNamespace(output_dir=str(tmp_path), hub_model_id="team/detector")
    state = TrainerState(global_step=3, is_world_process_zero=True)
    with caplog.at_level(logging.WARNING):
        HubCard().on_push_begin(args, state, TrainerControl())
    assert "without a card" in caplog.text
    assert "resolved_config.json" in caplog.text
    assert not (tmp_path / "README.md").exists()
