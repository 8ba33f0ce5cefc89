"""The best checkpoint as trainers keep it: settled arguments, evaluations that do not count, the link `best`."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from transformers import TrainingArguments

from coordexp.config import Prompt, Sections
from coordexp.errors import ConfigError
from coordexp.trainers.best_checkpoint import BestCheckpoint, link_best
from coordexp.trainers.runtime import RunSettings


def arguments(folder: Path, **changed) -> TrainingArguments:
    chosen = {"eval_strategy": "steps", "save_strategy": "steps", **changed}
    return TrainingArguments(output_dir=str(folder), use_cpu=True, **chosen)


def settings(**swift) -> RunSettings:
    return RunSettings("stage1_coord", Sections(), swift, Prompt())


def test_the_arguments_follow_the_catalogue(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    best = BestCheckpoint(args, settings(metric_for_best_model="eval_token_acc"))
    assert (args.metric_for_best_model, args.greater_is_better) == ("token_acc", True)
    assert best.derived() == {"metric_for_best_model": "token_acc", "greater_is_better": True}


@pytest.mark.parametrize("off", ["eval_strategy", "save_strategy"])
def test_nothing_is_derived_where_nothing_can_be_the_best(tmp_path: Path, off: str) -> None:
    assert BestCheckpoint(arguments(tmp_path, **{off: "no"}), settings()).derived() == {}


def test_a_contradiction_is_named(tmp_path: Path) -> None:
    wrong = settings(metric_for_best_model="loss", greater_is_better=True)
    with pytest.raises(ConfigError, match="metric_for_best_model = 'loss': loss is better when lower"):
        BestCheckpoint(arguments(tmp_path), wrong)


def test_an_absent_number_is_said_once_and_never_raised(tmp_path: Path, caplog) -> None:
    best = BestCheckpoint(arguments(tmp_path), settings(metric_for_best_model="coord_diag/w1"))
    with caplog.at_level(logging.WARNING):
        found = [
            best.may_be_best(numbers) for numbers in ({}, {"eval_loss": 1.0}, {"eval_coord_diag/w1": 2.0})
        ]
    assert found == [False, False, True]
    assert [record.getMessage() for record in caplog.records] == [
        "This evaluation picks no best checkpoint: it reported no eval_coord_diag/w1. (Said once for this reason.)"
    ]


def test_the_link_follows_the_best_step(tmp_path: Path) -> None:
    for step in (10, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    link_best(tmp_path, None)
    assert not (tmp_path / "best").exists()
    link_best(tmp_path, 10)
    assert os.readlink(tmp_path / "best") == "checkpoint-10"
    link_best(tmp_path, 20)
    assert (tmp_path / "best").resolve() == (tmp_path / "checkpoint-20").resolve()
    link_best(tmp_path, 30)  # not on the disk yet
    assert os.readlink(tmp_path / "best") == "checkpoint-20"
    assert {path.name for path in tmp_path.iterdir()} == {"best", "checkpoint-10", "checkpoint-20"}
