"""`debug.train_sample_limit` and `debug.val_sample_limit`: the first records, as ms-swift then loads them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support.processes import sft_flags

from coordexp.config import Prompt
from coordexp.data.dataset import read_training_rows
from coordexp.trainers.activate import activate_from_argv

LIMITS = {
    "none": ({}, 8, 4),
    "train": ({"train_sample_limit": 3}, 3, 4),
    "val": ({"val_sample_limit": 9}, 8, 4),
}


@pytest.mark.parametrize(("limits", "num_train", "num_val"), LIMITS.values(), ids=list(LIMITS))
def test_the_first_records_are_used(
    nano_model: Path, scenes: Path, tmp_path: Path, monkeypatch, limits, num_train, num_val
):
    from swift.dataset import load_dataset

    monkeypatch.setattr(sys, "argv", ["/somewhere/swift/cli/sft.py"])
    settings = json.dumps({"debug": limits, "custom": {"prompt": "Detect."}})
    activate_from_argv(sft_flags(nano_model, scenes, tmp_path / "out", coordexp=settings))
    for name, expected in (("train", num_train), ("val", num_val)):
        path = str(scenes / f"{name}.jsonl")
        loaded, _ = load_dataset([path])
        rows = list(read_training_rows(path, Prompt(user="Detect.")))[:expected]
        assert [row["messages"][-1]["content"] for row in loaded] == [
            row["messages"][-1]["content"] for row in rows
        ]
        assert len(loaded) == expected
