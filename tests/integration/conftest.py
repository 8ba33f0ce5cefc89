"""The nano model after a short training, made once per session."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.processes import run_swift, sft_flags


@pytest.fixture(scope="session")
def taught_model(nano_model: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano model after 100 steps on the training scenes: it writes valid answers, many of them wrong."""
    output = tmp_path_factory.mktemp("assets") / "taught"
    terms = {"ce_weight": 0.5, "soft_ce_weight": 0.5, "target_sigma": 8.0}
    flags = sft_flags(
        nano_model, scenes, output, max_steps=100, learning_rate=5e-3, val_dataset=None, logging_steps=50,
        save_strategy="steps", save_steps=100, save_only_model=True,
        coordexp=json.dumps({"custom": {"coord_soft_ce_w1": terms}}),
    )  # fmt: skip
    done = run_swift("sft", *flags)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return output / "checkpoint-100"
