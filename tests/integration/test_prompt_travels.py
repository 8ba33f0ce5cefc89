"""A checkpoint that left its run folder, or was merged by ms-swift, is asked as it was trained. About two minutes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.processes import run_coordexp, run_swift, sft_flags

from coordexp.config.prompt import PROMPT_FILE
from coordexp.inference.infer import infer_file

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


def test_what_swift_export_merges_is_asked_as_it_was_trained(
    nano_model: Path, scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """`swift export --merge_lora` takes the plugin from the checkpoint's args.json, and the prompt along."""
    done = run_swift(
        "sft",
        *sft_flags(
            nano_model, scenes, tmp_path / "run", save_strategy="steps", save_steps=1, val_dataset=None,
            tuner_type="lora", target_modules=["q_proj"], system="You detect.", max_pixels=2048,
            coordexp=json.dumps({"custom": {"prompt": "Find all.", "answer_format": "compact"}}),
        ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    merged = tmp_path / "merged"
    done = run_swift(
        "export",
        "--adapters",
        tmp_path / "run" / "checkpoint-1",
        "--merge_lora",
        "true",
        "--output_dir",
        merged,
    )
    assert done.returncode == 0, done.stderr[-3000:]

    infer_file(merged, scenes / "val.jsonl", tmp_path / "a", limit=1, max_new_tokens=2)
    asked = json.loads((tmp_path / "a" / "infer_run.json").read_text())
    assert (asked["prompt"], asked["system"]) == ("Find all.", "You detect.")
    assert asked["pixels"]["max_pixels"] == 2048
    assert asked["answer_form"] == "compact"
    assert PROMPT_FILE not in caplog.text

    (merged / PROMPT_FILE).unlink()
    infer_file(merged, scenes / "val.jsonl", tmp_path / "b", limit=1, max_new_tokens=2)
    assert f"{merged} holds no {PROMPT_FILE}, so nothing says how it was trained" in caplog.text
