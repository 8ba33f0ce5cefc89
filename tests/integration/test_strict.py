"""A sample that cannot be encoded: named by default, replaced and counted when that is asked for."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from support.processes import PLUGIN, run_coordexp, run_swift, sft_flags
from support.stage2 import rollout_aligned

from coordexp.metrics.sinks import read_payloads

pytestmark = pytest.mark.slow

OBJECT = {"desc": "red box", "bbox_2d": [10, 20, 300, 400]}


@pytest.fixture
def data(scenes: Path, tmp_path: Path) -> Path:
    """The scenes, with 200 objects in the fifth."""
    folder = Path(shutil.copytree(scenes, tmp_path / "data"))
    file = folder / "train.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    records[4]["objects"] = [OBJECT] * 200
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The last line of a run that ended with a user's mistake."""
    assert done.returncode == 2, done.stderr[-1500:]
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_a_picture_that_turns_out_broken_ends_the_run_in_one_line(
    nano_model: Path, scenes: Path, tmp_path: Path
):
    """Its header is good, which is all that is looked at beforehand; a data-loader worker finds it."""
    data = Path(shutil.copytree(scenes, tmp_path / "data"))
    picture = data / "images" / "train" / "000004.png"
    picture.write_bytes(picture.read_bytes()[:-200])
    done = run_swift(
        "sft", *sft_flags(nano_model, data, tmp_path / "run", strict=None, dataloader_num_workers=1)
    )
    assert one_line(done).startswith(f"coordexp: {data / 'train.jsonl'}:5: image {picture} cannot be read")


def test_a_ground_truth_that_is_too_long_ends_the_run_before_its_first_step(
    nano_model: Path, data: Path, tmp_path: Path
):
    flags = sft_flags(
        nano_model, data, tmp_path / "run", strict=None, custom_trainer_variant="stage2_rollout_aligned",
        coordexp=json.dumps(rollout_aligned()), val_dataset=None,
    )  # fmt: skip
    last = one_line(run_swift("sft", *flags))
    start = f"coordexp: 1 of 8 samples are longer than 320 tokens: {data / 'train.jsonl'}:5 has 5240 (200 objects, "
    assert last.startswith(start)
    limits = "global_max_length (max_length in ms-swift's flat form) and rollout_matching.packing_length"
    assert f". Raise {limits} to 5240, or" in last


def test_replacements_are_counted_and_spawned_workers_read_no_data(
    nano_model: Path, data: Path, tmp_path: Path
):
    """The data files are gone when the workers start."""
    plugins = [PLUGIN, Path(__file__).with_name("forget_data_plugin.py")]
    flags = sft_flags(
        nano_model, data, tmp_path / "run", strict=False, external_plugins=plugins, dataloader_num_workers=1,
        dataloader_multiprocessing_context="spawn", max_steps=2, per_device_train_batch_size=4,
    )  # fmt: skip
    done = run_swift("sft", *flags)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert not (data / "train.jsonl").exists()
    metrics = [payload["metrics"] for payload in read_payloads(tmp_path / "run" / "metrics.jsonl")]
    assert sum(numbers.get("health/samples_replaced_total", 0) for numbers in metrics) == 1
    report = run_coordexp("doctor", tmp_path / "run").stdout
    assert "health/samples_replaced_total: 1 over the run" in report.replace("\n", " ")
