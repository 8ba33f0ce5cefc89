"""Real training runs of tiny models on a CPU, each in processes of its own, and what they cost."""

from __future__ import annotations

import json
import os
import socket
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from training_run import run_training

from coordexp.data.scene_config import ShapesConfig
from coordexp.data.shapes import generate_shapes
from coordexp.models.tiny import PRESETS, build_tiny_model

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 2
"""Steps that are not counted: allocators and caches fill."""
RESULT = "trial.json"
ROLLOUT_ALIGNED, TWO_CHANNEL = "stage2_rollout_aligned", "stage2_two_channel"


@dataclass(frozen=True)
class Trial:
    """A run. objects: in each scene of side x side pixels.  size: differences from the tiny preset `demo`."""

    name: str
    stage: str = "stage1"
    objects: int = 4
    side: int = 64
    batch: int = 8
    accumulate: int = 1
    packing_length: int | None = None
    head: str = "plain"
    checkpointing: bool = False
    frozen_vision: bool = False
    new_tokens: int = 32
    answers: int = 1
    decode_batch: int = 32
    forwards: int = 1
    ranks: int = 1
    steps: int = 8
    size: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_rollouts(self) -> bool:
        return self.stage != "stage1"

    def settings(self, folder: Path) -> dict[str, Any]:
        """Its run file."""
        has_vision = not self.frozen_vision
        base = "configs/demo/stage1.yaml" if self.stage == "stage1" else f"configs/{self.stage}/demo.yaml"
        custom: dict[str, Any] = {"head": self.head}
        sections: dict[str, Any] = {"custom": custom}
        if self.has_rollouts:
            sections["rollout_matching"] = {
                "max_new_tokens": self.new_tokens,
                "decode_batch_size": self.decode_batch,
                "num_return_sequences": self.answers,
                "packing": self.packing_length is not None,
                "packing_length": self.packing_length,
                "repeat_terminate": {"enabled": False},
                "decoding": {"temperature": 1.0 if self.answers > 1 else 0.0, "top_p": 1.0, "top_k": -1},
            }
        if self.stage == TWO_CHANNEL:
            sections["stage2_ab"] = {"n_softctx_iter": self.forwards}
        if self.packing_length is not None and not self.has_rollouts:
            sections["training"] = {"packing": True}
        return {
            "extends": str(ROOT / base),
            "coordexp": sections,
            "model": str(folder / "model"),
            "dataset": [str(folder / "data/train.jsonl")],
            "val_dataset": [str(folder / "data/val.jsonl")],
            "external_plugins": [str(ROOT / "coordexp/plugin.py"), str(Path(__file__).with_name("trial_plugin.py"))],
            "callbacks": ["scale_trial"],
            "max_length": 4096,
            "max_pixels": self.side * self.side,
            "max_steps": WARM_UP + self.steps + 1,
            "per_device_train_batch_size": self.batch,
            "gradient_accumulation_steps": self.accumulate,
            "gradient_checkpointing": self.checkpointing,
            "freeze_vit": not has_vision,
            "freeze_aligner": not has_vision,
            "dataloader_num_workers": 0,
            "eval_strategy": "no",
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": ["none"],
            **({"packing_length": self.packing_length} if self.packing_length and not self.has_rollouts else {}),
        }  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a run cost: CPU seconds of each counted step by phase, bytes, and what the steps consisted of."""

    steps: list[dict[str, Any]]
    weights: int
    optimizer: int
    growth: int

    def seconds(self, phase: str | None = None, channel: str | None = None) -> float:
        """Median CPU seconds of a step, of one phase or in all; of one channel or of all."""
        told = [s["cpu_s"] for s in self.steps if channel in (None, s["channel"])]
        return float(statistics.median(sum(one.values()) if phase is None else one[phase] for one in told))


def run_trial(trial: Trial, folder: Path, *, reuse: bool = False) -> Outcome:
    """Run it in `folder`; SystemExit naming the log where it fails.

    reuse: take what an earlier run of the same trial left in the folder, if it did.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    done = folder / "done.txt"
    if not (reuse and done.is_file() and done.read_text(encoding="utf-8") == repr(trial)):
        done.unlink(missing_ok=True)
        _run(trial, folder)
        done.write_text(repr(trial), encoding="utf-8")
    found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return Outcome(found["steps"][WARM_UP:], found["weights"], found["optimizer"], found["growth"])


def _run(trial: Trial, folder: Path) -> None:
    build_tiny_model(folder / "model", size=replace(PRESETS["demo"], **dict(trial.size)), seed=0)
    per_step = trial.batch * trial.accumulate * trial.ranks
    scenes = ShapesConfig(
        width=trial.side, height=trial.side, min_objects=trial.objects, max_objects=trial.objects,
        min_side=6, max_side=14, max_overlap=0.02, real_valued=True,
    )  # fmt: skip
    generate_shapes(folder / "data", scenes, num_train=max(64, 2 * per_step), num_val=2, seed=1)
    config, result = folder / "run.yaml", folder / RESULT
    config.write_text(yaml.safe_dump(trial.settings(folder), sort_keys=False), encoding="utf-8")
    environment = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "SCALE_TRIAL": str(result),
        "HF_HUB_OFFLINE": "1",
    }
    if trial.ranks > 1:
        environment |= {"NPROC_PER_NODE": str(trial.ranks), "MASTER_PORT": _free_port()}
    os.environ.pop("SCALE_TRIAL", None)
    run_training(config, folder / "run", (), environment)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
