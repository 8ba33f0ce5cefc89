"""A checkpoint that left its run folder is asked as it was trained. Takes about a minute."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.processes import run_coordexp, run_swift, sft_flags

pytestmark = pytest.mark.slow


def test_a_checkpoint_that_left_its_run_is_asked_as_it_was_trained(
    nano_model: Path, scenes: Path, tmp_path: Path
):
    custom = {"prompt": "Find all.", "object_field_order": "geometry_first"}
    done = run_swift(
        "sft",
        *sft_flags(
            nano_model, scenes, tmp_path / "run", save_strategy="steps", save_steps=1, val_dataset=None,
            system="You detect.", max_pixels=2048, coordexp=json.dumps({"custom": custom}),
        ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    model = tmp_path / "elsewhere"
    shutil.move(tmp_path / "run" / "checkpoint-1", model)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (model / name).read_bytes() == (nano_model / name).read_bytes()

    infer = ["infer", "--model", model, "--data", scenes / "val.jsonl", "--max-new-tokens", 2, "--limit", 1]
    done = run_coordexp(*infer, "--output", tmp_path / "a")
    assert done.returncode == 0, done.stderr[-3000:]
    asked = json.loads((tmp_path / "a" / "infer_run.json").read_text())
    assert (asked["prompt"], asked["system"]) == ("Find all.", "You detect.")
    assert (asked["object_field_order"], asked["pixels"]["max_pixels"]) == ("geometry_first", 2048)

    done = run_coordexp(*infer, "--output", tmp_path / "b", "--prompt", "Find cats.")
    assert done.returncode == 0, done.stderr[-3000:]
    assert '--prompt is "Find cats.", trained with "Find all."' in done.stderr
