"""Stage 2 from a checkpoint that reads its prompt as baked vectors: rollouts and targets are asked with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.latents import latent_checkpoint
from support.processes import run_swift, sft_flags
from support.stage2 import two_channel

from coordexp.codec.latent_vocab import latent_text
from coordexp.config.prompt import read_prompt
from coordexp.inference.latents import export_prefix
from coordexp.metrics.sinks import read_payloads

pytestmark = pytest.mark.slow


def test_stage_2_trains_on_rollouts_that_a_baked_prefix_asks_for(
    nano_model: Path, scenes: Path, tmp_path: Path
):
    """Two steps: one on the ground truth, one on rollouts. The saved checkpoint is asked in the same way."""
    names = [f"{color} {kind}" for color in ("red", "green", "blue", "black") for kind in ("box", "circle")]
    checkpoint = latent_checkpoint(nano_model, tmp_path / "latent", "Detect {classes}.", 4)
    export_prefix(checkpoint, tmp_path / "baked", classes=names, bake=True)
    sections = two_channel(0.5)
    flags = sft_flags(
        tmp_path / "baked", scenes, tmp_path / "run", custom_trainer_variant="stage2_two_channel", max_steps=2,
        learning_rate=1e-4, val_dataset=None, save_strategy="steps", save_steps=2, coordexp=json.dumps(sections),
    )  # fmt: skip
    done = run_swift("sft", *flags)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    steps = [p["metrics"] for p in read_payloads(tmp_path / "run" / "metrics.jsonl") if p["mode"] == "train"]
    assert steps[1]["stage2/raw_rollouts"] == 8
    record = read_prompt(tmp_path / "run" / "checkpoint-2")
    assert record is not None
    assert record.prompt.user == latent_text(4)
    assert f"<|vision_end|>{latent_text(4)}<|im_end|>" in str(record.prompt.rendered)
