"""Both heads and self-context under DeepSpeed ZeRO-3 on two gloo ranks: the gradients of the whole model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.processes import ROOT, free_port

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(nano_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    output = tmp_path_factory.mktemp("zero3") / "gradients.pt"
    program = Path(__file__).parent / "zero3_rank.py"
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "DS_ACCELERATOR": "cpu",
    }
    done = subprocess.run(
        [sys.executable, *launch, str(program), str(nano_model), str(output)],
        capture_output=True, text=True, env=env, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return torch.load(output, weights_only=True)


@pytest.mark.parametrize(
    ("model", "sharded"),
    [
        ("tied", "plain"),
        ("tied", "fused"),
        ("lora", "plain"),
        ("lora", "fused"),
        ("head unroll", "plain"),
        ("head unroll", "fused"),
        ("self-context", "sharded"),
    ],
)
def test_sharded_gradients_equal_those_of_the_whole_model(found, model: str, sharded: str):
    whole, parts = found[f"{model} whole"], found[f"{model} {sharded}"]
    assert parts.keys() == whole.keys()
    for name, expected in whole.items():
        assert (parts[name] - expected).norm() <= 1e-5 * expected.norm() + 1e-9, name


@pytest.mark.parametrize("sharded", ["plain", "fused"])
def test_the_gradient_probe_says_the_same_of_sharded_weights(found, sharded: str):
    whole, parts = found["probe whole"], found[f"probe {sharded}"]
    assert parts.keys() == whole.keys()
    assert whole["gradient/norm/total"] > 0
    for name, expected in whole.items():
        torch.testing.assert_close(parts[name], expected, rtol=1e-5, atol=1e-7)
