"""Dry runs that step, in processes of their own: what they print, what they leave, and what does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from support.processes import PLUGIN, ROOT, run_swift, sft_flags, swift_environment
from support.stage2 import two_channel
from support.tight_runs import TIGHT, tight, vocabulary

pytestmark = pytest.mark.slow


def facts(console: str) -> dict[str, str]:
    """Name -> text of the lines of the report."""
    return {
        line[:21].strip(): line[21:]
        for line in console.splitlines()
        if line[:21].strip() and line[20:21] == " "
    }


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for TMPDIR with a short name: loader workers have sockets in it, whose paths end at 107 bytes."""
    with TemporaryDirectory(prefix="dry") as folder:
        yield Path(folder)


def test_one_step_of_each_channel_runs_and_nothing_is_left(
    nano_model: Path, scenes: Path, tmp_path: Path, temporary: Path
):
    """By `coordexp train`, in a folder that a real run has used."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "args.json").write_text("of a real run")
    flags = sft_flags(
        nano_model, scenes, run, custom_trainer_variant="stage2_two_channel", max_steps=40,
        per_device_train_batch_size=2, eval_strategy="steps", eval_steps=10, save_strategy="steps",
        report_to="tensorboard", external_plugins=None, ignore_args_error=None,
    )  # fmt: skip
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"custom": {"trainer_variant": "stage2_two_channel"}, **two_channel(0.25)}))
    command = [sys.executable, "-m", "coordexp.cli.main", "train", "--dry-run=step", str(config), *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, cwd=ROOT,
        env=swift_environment(TMPDIR=str(temporary)),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    told = facts(done.stdout)
    assert told["dry run"] == "stage2_two_channel on 1 rank(s); nothing of it is kept"
    assert told["lengths"].startswith("8 training samples: longest ")
    assert told["step A"].startswith("2 of the longest samples in ")
    assert "generate " in done.stdout.split("step B")[1].split("evaluation")[0]
    assert told["evaluation"].startswith("2 images on this rank: by answers ")
    assert told["estimate"].startswith("30 of A, 10 of B: ")
    assert "and 4 evaluations" in told["estimate"]
    assert '"objects"' in done.stdout.split("\nsample ")[1]
    assert [path.name for path in run.iterdir()] == ["args.json"]
    assert (run / "args.json").read_text() == "of a real run"
    assert not [path for path in temporary.iterdir() if path.name.startswith("coordexp_dry_run_")]


def test_plain_swift_leaves_nothing_either_and_a_sample_that_is_too_long_is_named(
    nano_model: Path, scenes: Path, tmp_path: Path
):
    flags = sft_flags(
        nano_model, scenes, tmp_path / "run", per_device_train_batch_size=4, max_length=60,
        coordexp=json.dumps({"custom": {"dry_run": "step"}}),
    )  # fmt: skip
    done = run_swift("sft", *flags)
    console = done.stdout + done.stderr
    assert done.returncode == 2, console[-3000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("coordexp: ")]
    assert "is larger than the max_length(60)" in line
    assert "Raise global_max_length" in line
    assert "Traceback" not in console
    assert not (tmp_path / "run").exists()


def test_a_step_that_does_not_fit_is_named_with_its_lengths(nano_model: Path, scenes: Path, tmp_path: Path):
    flags = sft_flags(
        nano_model, scenes, tmp_path / "run", external_plugins=[TIGHT, PLUGIN],
        coordexp=json.dumps({"custom": {"dry_run": "step", "head": "plain"}}),
    )  # fmt: skip
    done = run_swift("sft", *flags, **tight(vocabulary(nano_model), 8, 99))
    console = done.stdout + done.stderr
    assert done.returncode == 1, console[-3000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("coordexp: ")]
    assert line.startswith(
        "coordexp: dry run: the forward and backward pass of step teacher-forced (input ids of [(8, "
    )
    assert "does not fit: aten." in line
    assert "Lower max_pixels" in line
    assert not (tmp_path / "run").exists()
