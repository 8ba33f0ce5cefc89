"""Two nodes without a shared disk: each has a home of its own, and the run's folder lies there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.processes import ROOT, free_port, sft_flags, swift_environment, warm_server
from support.warm import Done

from coordexp.metrics.sinks import read_payloads

pytestmark = pytest.mark.slow


def run_nodes(argv: list[str], homes: list[Path], **environment: str) -> Done:
    """What two launchers start, one process on each node."""
    shared = swift_environment(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", LOCAL_RANK="0",
        TORCHELASTIC_RUN_ID="none", **environment,
    )  # fmt: skip
    ranks = [
        {**shared, "RANK": str(node), "GROUP_RANK": str(node), "HOME": str(home)}
        for node, home in enumerate(homes)
    ]
    return warm_server().run("swift.cli.sft", argv, as_script=True, environments=ranks, cwd=ROOT, timeout=300)


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [tmp_path_factory.mktemp(f"node{node}") for node in range(2)]


def flags(model: Path, scenes: Path, **more: Any) -> list[str]:
    wanted = {"max_steps": 3, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1}
    return sft_flags(model, scenes, more.pop("output_dir", Path("~/run")), **{**wanted, **more})


@pytest.fixture(scope="module")
def trained(nano_model: Path, scenes: Path, homes: list[Path]) -> list[Path]:
    """Run folders of three steps with an evaluation and a checkpoint after each."""
    more = {
        "save_on_each_node": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
    }
    done = run_nodes(flags(nano_model, scenes, **more), homes)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return [home / "run" for home in homes]


def losses(run: Path) -> dict[int, float]:
    payloads = [payload for payload in read_payloads(run / "metrics.jsonl") if payload["mode"] == "train"]
    return {p["global_step"]: p["metrics"]["loss"] for p in payloads if "loss" in p["metrics"]}


def test_each_node_has_every_checkpoint_and_the_link_to_the_best(trained):
    names = [{path.name for path in run.glob("checkpoint-*")} for run in trained]
    assert names == [{"checkpoint-1", "checkpoint-2", "checkpoint-3"}] * 2
    for run in trained:
        assert json.loads((run / "checkpoint-3" / "trainer_state.json").read_text())["best_global_step"] == 3
        assert (run / "best").resolve() == run / "checkpoint-3"
    first, second = (load_file(run / "checkpoint-3" / "model.safetensors") for run in trained)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_each_node_resumes_from_its_own_checkpoint(trained, nano_model, scenes, homes):
    before = losses(trained[0])
    more = {
        "save_on_each_node": True,
        "resume_from_checkpoint": "~/run/checkpoint-1",
        "output_dir": "~/again",
    }
    done = run_nodes(flags(nano_model, scenes, **more), homes)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    after = losses(homes[0] / "again")
    assert set(after) == {2, 3}
    assert after == pytest.approx({step: before[step] for step in after}, rel=1e-5)


def test_checkpoints_of_rank_0_alone_are_refused_on_both_nodes(nano_model, scenes, tmp_path):
    homes = [tmp_path / "a", tmp_path / "b"]
    done = run_nodes(flags(nano_model, scenes), homes)
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if "coordexp: output_dir:" in line]
    assert len(said) == 2
    for line in said:
        assert f"{homes[1]}/run of rank 1 on " in line
        assert f"is not the folder {homes[0]}/run of rank 0 on " in line
        assert line.endswith("or set save_on_each_node: true.")
    assert not any(home.exists() for home in homes)
