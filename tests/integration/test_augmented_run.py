"""Training on augmented pictures: other ones at every turn, the same after a resume, in both stages."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from support.processes import PLUGIN, run_swift, sft_flags
from support.stage2 import rollout_aligned

from coordexp.files import read_jsonl
from coordexp.metrics.sinks import read_payloads

pytestmark = pytest.mark.slow

AUGMENTATION = {
    "enabled": True,
    "ops": [
        {"name": "hflip", "params": {"prob": 0.5}},
        {"name": "random_crop", "params": {"scale": [0.6, 1.0]}},
        {"name": "color_jitter", "params": {"brightness": [0.7, 1.3]}},
    ],
    "curriculum": {"phases": [
        {"until_percent": 40, "ops": {"hflip": {"prob": 0.0}}}, {"until_percent": 100, "bypass_prob": 0.2},
    ]},
}  # fmt: skip
Samples = dict[tuple[int, int, float], str]


def train(
    model: Path, scenes: Path, output: Path, sections: dict[str, Any], **flags: Any
) -> tuple[Samples, Path]:
    """What was shown at every draw, and the run folder."""
    plugins = [PLUGIN, Path(__file__).with_name("watch_samples_plugin.py")]
    samples_file = output.with_suffix(".jsonl")
    argv = sft_flags(
        model, scenes, output, external_plugins=plugins, coordexp=json.dumps(sections), val_dataset=None,
        save_strategy="steps", add_version=False, **flags,
    )  # fmt: skip
    done = run_swift("sft", *argv, SAMPLES_FILE=str(samples_file))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    lines = [line for _, line in read_jsonl(samples_file)]
    return {(line["index"], line["epoch"], line["progress"]): line["shown"] for line in lines}, output


def losses(run: Path) -> list[float]:
    payloads = [p["metrics"] for p in read_payloads(run / "metrics.jsonl") if p["mode"] == "train"]
    return [metrics["loss"] for metrics in payloads if "learning_rate" in metrics]


def check_resumed(whole: tuple[Samples, Path], resumed: tuple[Samples, Path], step: int) -> None:
    """The resumed run shows what the whole one showed from `step` on, and loses as much."""
    start = step / len(losses(whole[1]))
    wanted, found = (
        {key: shown for key, shown in samples.items() if start <= key[2] < 1}
        for samples in (whole[0], resumed[0])
    )
    assert len(wanted) >= 8
    assert found == wanted
    assert losses(resumed[1]) == pytest.approx(losses(whole[1])[step:], rel=1e-6)


def test_stage1(nano_model: Path, scenes: Path, tmp_path: Path):
    sections = {"custom": {"augmentation": AUGMENTATION}}
    flags = {
        "max_steps": 5, "per_device_train_batch_size": 4, "save_steps": 3, "dataloader_num_workers": 2,
        "dataloader_persistent_workers": True,
    }  # fmt: skip
    whole = train(nano_model, scenes, tmp_path / "whole", sections, **flags)
    turns = defaultdict(list)
    for (index, _, _), shown in whole[0].items():
        turns[index].append(shown)
    assert len(turns) == 8
    assert all(len(shown) == len(set(shown)) >= 2 for shown in turns.values())
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = train(
        nano_model, scenes, tmp_path / "again", sections, **flags, resume_from_checkpoint=checkpoint
    )
    check_resumed(whole, resumed, step=3)
    plain = train(nano_model, scenes, tmp_path / "plain", {}, **flags)
    assert losses(plain[1]) != pytest.approx(losses(whole[1]), rel=1e-3)


def test_stage2(taught_model: Path, scenes: Path, tmp_path: Path):
    sections = rollout_aligned(eval_detection={"enabled": False}) | {"custom": {"augmentation": AUGMENTATION}}
    flags = {"max_steps": 3, "save_steps": 2, "custom_trainer_variant": "stage2_rollout_aligned"}
    whole = train(taught_model, scenes, tmp_path / "whole", sections, **flags)
    assert {(index, epoch) for index, epoch, _ in whole[0]} >= {(i, e) for i in range(8) for e in range(3)}
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed = train(
        taught_model, scenes, tmp_path / "again", sections, **flags, resume_from_checkpoint=checkpoint
    )
    check_resumed(whole, resumed, step=2)
