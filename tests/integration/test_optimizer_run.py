"""`optimizer: coord_muon` through `swift sft`: its groups, resuming, offsets, LoRA, stage 2, two ranks under ZeRO 2."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.processes import PLUGIN, free_port, run_swift, sft_flags
from support.stage2 import two_channel

from coordexp.metrics.sinks import read_payloads

pytestmark = pytest.mark.slow

STEPS = 4
DEEPSPEED_ON_CPU = Path(__file__).with_name("deepspeed_on_cpu_plugin.py")
CUSTOM = {
    "coord_offset": {"enabled": True, "embed_lr": 0.003},
    "optimizer": {
        "groups": [{"patterns": ["*embed_tokens*"], "lr_scale": 0.5}],
        "muon": {
            "matrices": ["*language_model.layers.*_proj.weight", "*visual.blocks.*.attn.*.weight"],
            "split": {"*.qkv.weight": 3},
            "lr_scale": 2.0,
        },
    },
}
LORA = {"tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0, "target_modules": ["q_proj", "v_proj"]}
ON_TWO_RANKS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "ddp": ({}, {}),
    "zero2": (
        {"deepspeed": "zero2", "use_cpu": None, "external_plugins": [DEEPSPEED_ON_CPU, PLUGIN]},
        {"ACCELERATE_USE_CPU": "false"},
    ),
}


def train(
    nano: Path, scenes: Path, output: Path, environment: dict[str, str] | None = None, **more: Any
) -> str:
    argv = sft_flags(
        nano, scenes, output, **{
            "optimizer": "coord_muon", "max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "vit_lr": 5e-4,
            "weight_decay": 0.1, "train_dataloader_shuffle": False, "coordexp": json.dumps({"custom": CUSTOM}), **more,
        },
    )  # fmt: skip
    done = run_swift("sft", *argv, **(environment or {}))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def run(nano_model: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("muon") / "run"
    return output, train(nano_model, scenes, output)


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / f"checkpoint-{STEPS}" / "model.safetensors")


def losses_of(output: Path) -> list[float]:
    payloads = read_payloads(output / "metrics.jsonl")
    return [payload["metrics"]["loss"] for payload in payloads if "loss" in payload["metrics"]]


def test_groups_are_in_the_log_and_in_the_resolved_configuration(run, nano_model: Path):
    output, log = run
    rows = json.loads((output / "resolved_config.json").read_text())["derived"]["optimizer_groups"]
    assert [(r["group"], r["optimizer"], r["learning_rate"], r["weight_decay"]) for r in rows] == [
        ("everything else (vectors)", "adamw", 1e-3, 0.0),
        ("vision tower: everything else", "adamw", 5e-4, 0.1),
        ("vision tower: everything else (vectors)", "adamw", 5e-4, 0.0),
        ("aligner: everything else", "adamw", 1e-3, 0.1),
        ("aligner: everything else (vectors)", "adamw", 1e-3, 0.0),
        ("*embed_tokens*", "adamw", 5e-4, 0.1),
        ("*language_model.layers.*_proj.weight", "muon", 2e-3, 0.1),
        ("vision tower: *visual.blocks.*.attn.*.weight", "muon", 1e-3, 0.1),
        ("custom.coord_offset", "adamw", 0.003, 0.0),
    ]
    weights = load_file(nano_model / "model.safetensors")
    offsets = 1000 * weights["model.language_model.embed_tokens.weight"].shape[1]
    assert sum(r["parameters"] for r in rows) == sum(w.numel() for w in weights.values()) + offsets
    muon = [w for name, w in weights.items() if "language_model.layers" in name and "_proj" in name]
    assert (rows[6]["tensors"], rows[6]["parameters"]) == (len(muon), sum(w.numel() for w in muon))
    assert "vision tower: *visual.blocks.*.attn.*.weight  muon" in log


def test_muon_sees_clipped_gradients(run):
    """Momentum is a mean of gradients, of which each is at most 1 long (max_grad_norm), beginning with 0."""
    output, _ = run
    state = torch.load(output / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)["state"]
    buffers = [entry["momentum_buffer"] for entry in state.values() if "momentum_buffer" in entry]
    length = math.sqrt(sum(buffer.square().sum().item() for buffer in buffers))
    payloads = read_payloads(output / "metrics.jsonl")
    grad_norms = [p["metrics"]["grad_norm"] for p in payloads if "loss" in p["metrics"]]
    assert min(grad_norms) > 2  # before clipping
    assert 0.01 < length <= 1 - 0.95**STEPS


def test_resumed_run_ends_with_the_same_bits(run, nano_model: Path, scenes: Path, tmp_path: Path):
    output, _ = run
    again = tmp_path / "again"
    train(nano_model, scenes, again, resume_from_checkpoint=output / "checkpoint-2", ignore_data_skip=False)
    expected, found = weights_of(output), weights_of(again)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("ranks", list(ON_TWO_RANKS))
def test_two_ranks_train_what_one_process_trains(run, ranks, nano_model: Path, scenes: Path, tmp_path: Path):
    """Up to the order of sums. Muon makes more of that than AdamW: gradients of so small a model have singular values
    near 0, and their directions become as long as all others.
    """
    more, environment = ON_TWO_RANKS[ranks]
    two = {"NPROC_PER_NODE": "2", "MASTER_PORT": free_port(), **environment}
    train(nano_model, scenes, tmp_path / "run", two, per_device_train_batch_size=4, **more)
    start = load_file(nano_model / "model.safetensors")
    expected, found = weights_of(run[0]), weights_of(tmp_path / "run")
    apart = {}
    for name, weight in expected.items():
        moved = weight - start.get(name, torch.zeros(()))  # offsets start from 0
        apart[name] = ((found[name] - weight).norm() / moved.norm()).item()
    assert sum(apart.values()) / len(apart) < 0.01
    assert {name: share for name, share in apart.items() if share > 0.15} == {}
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(run[0]), rel=2e-5)


def test_lora_needs_patterns_of_its_own(nano_model: Path, scenes: Path, tmp_path: Path):
    sections = {"custom": {"coord_offset": {"enabled": True}}}
    argv = sft_flags(
        nano_model, scenes, tmp_path / "run", optimizer="coord_muon", coordexp=json.dumps(sections), **LORA
    )
    done = run_swift("sft", *argv)
    assert done.returncode == 2
    assert (
        "under LoRA the projections are, and what is trained are the matrices *.lora_A.* and *.lora_B.*"
        in done.stderr
    )


def test_lora_in_stage_2_with_both_channels(taught_model: Path, scenes: Path, tmp_path: Path):
    matrices = {"optimizer": {"muon": {"matrices": ["*.lora_A.*", "*.lora_B.*"]}}}
    sections = {**two_channel(0.5), "custom": {"coord_offset": {"enabled": True}, **matrices}}
    train(
        taught_model, scenes, tmp_path / "run", custom_trainer_variant="stage2_two_channel", max_steps=2, vit_lr=None,
        coordexp=json.dumps(sections), val_dataset=None, **LORA,
    )  # fmt: skip
    rows = json.loads((tmp_path / "run" / "resolved_config.json").read_text())["derived"]["optimizer_groups"]
    assert [(r["group"], r["optimizer"]) for r in rows] == [
        ("*.lora_A.*", "muon"),
        ("*.lora_B.*", "muon"),
        ("custom.coord_offset", "adamw"),
    ]
    adapter = load_file(tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors")
    assert all(w.abs().max() > 0 for name, w in adapter.items() if "lora_B" in name)
