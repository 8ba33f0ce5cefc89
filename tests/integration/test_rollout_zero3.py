"""Rollouts of a model partitioned by DeepSpeed ZeRO-3 over two gloo ranks with unequal work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import ROOT, free_port

pytestmark = pytest.mark.slow


def test_a_partitioned_model_answers_and_is_exported_like_the_whole_one(nano_model: Path, tmp_path: Path):
    from coordexp.data.shapes import PRESETS, generate_shapes

    generate_shapes(tmp_path / "scenes", PRESETS["pixels"], num_train=0, num_val=20, seed=3)
    here = Path(__file__).parent
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    program = [str(here / "rollout_zero3_rank.py"), str(nano_model), str(tmp_path / "scenes" / "val.jsonl")]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{here}",
    }
    done = subprocess.run(
        [sys.executable, *launch, *program, str(tmp_path)],
        capture_output=True, text=True, env=env, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for rank in range(2):
        facts = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert facts == dict.fromkeys(facts, True), f"rank {rank}"
        assert len(facts) == 9
