"""Muon and AdamW on two gloo ranks: DDP, ZeRO 1 and 2 give bit for bit the weights of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import ROOT, free_port

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("muon") / "weights.pt"
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "DS_ACCELERATOR": "cpu",
    }
    done = subprocess.run(
        [sys.executable, *launch, str(Path(__file__).with_name("muon_rank.py")), str(output)],
        capture_output=True, text=True, env=env, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return torch.load(output, weights_only=True)


def test_partitions_cut_through_matrices(found):
    assert found["cut"] == 2  # one of each group of Muon


@pytest.mark.parametrize("ranks", ["ddp", "zero 1", "zero 2", "zero 2 resumed"])
def test_two_ranks_train_as_one_process(found, ranks: str):
    assert found[ranks].keys() == found["alone"].keys()
    for name, expected in found["alone"].items():
        assert torch.equal(found[ranks][name], expected), name
