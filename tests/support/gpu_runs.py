"""Training runs of the GPU checks: the same command on a device and on the CPU, and models whose answers are known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from support.processes import ROOT, sft_flags
from torch import nn

from coordexp.metrics.sinks import read_payloads

Records = list[dict[str, Any]]
CPU = torch.device("cpu")


def environment(device: torch.device, **more: str) -> dict[str, str]:
    """Of a process on one device."""
    found = {**os.environ, "HF_HUB_OFFLINE": "1", "COORDEXP_STRICT_METRICS": "1", "OMP_NUM_THREADS": "1"}
    found.pop("ACCELERATE_USE_CPU", None)
    if device.type == "cpu":
        found["ACCELERATE_USE_CPU"] = "true"
    else:
        found["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return found | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **more}


def train(
    model: Path, scenes: Path, output: Path, device: torch.device, sections: dict[str, Any], **flags: Any
) -> Records:
    """The records of the steps of a `swift sft` run on a device."""
    argv = sft_flags(
        model, scenes, output, coordexp=json.dumps(sections),
        **{
            "val_dataset": None, "max_steps": 3, "use_cpu": True if device.type == "cpu" else None, **flags,
        },
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "swift.cli.main", "sft", *argv],
        capture_output=True, text=True, env=environment(device), cwd=ROOT, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    found = [payload["metrics"] for payload in read_payloads(output / "metrics.jsonl")]
    return [metrics for metrics in found if "loss" in metrics and "learning_rate" in metrics]


def run_program(program: Path, device: torch.device, *arguments: object, processes: int = 1) -> None:
    """A program of tests/gpu in a process of its own, or in several under torchrun with a device each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = environment(device)
    if processes > 1:
        env.pop("CUDA_VISIBLE_DEVICES", None)
        env |= {"CUDA_VISIBLE_DEVICES": value} if (value := os.environ.get("CUDA_VISIBLE_DEVICES")) else {}
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), str(program), *map(str, arguments)],
        capture_output=True, text=True, env=env, cwd=ROOT, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


@torch.no_grad()
def write_always(model: nn.Module, token_id: int) -> None:
    """Weights with which a model writes one token for ever, whatever it is asked, in any dtype.

    No layer adds anything, all embeddings point one way, and the head's row of the token is twice as long as others.
    """
    for name, parameter in model.named_parameters():
        if (
            name.endswith(("self_attn.o_proj.weight", "language_model.norm.weight"))
            or "down_proj.weight" in name
        ):
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight.fill_(0.25)
        module.weight[token_id] = 0.5
