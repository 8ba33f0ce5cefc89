"""Stage 2 with a rollout server: the numbers of a run without one, also while it trains during generation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.processes import PLUGIN, free_port, run_swift, sft_flags
from support.rollout_server import RolloutServer, rollout_server
from support.stage2 import rollout_aligned, two_channel
from support.vllm import require_vllm

from coordexp.metrics.sinks import read_payloads

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

STEPS = 3
SAME = (
    "loss",
    "grad_norm",
    "coord_diag/",
    "rollout/f1",
    "rollout/gt",
    "rollout/valid",
    "rollout/gen_new_tokens_total",
)


@pytest.fixture(scope="module")
def server(taught_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutServer]:
    require_vllm()
    with rollout_server(taught_model, tmp_path_factory.mktemp("server") / "console.txt") as running:
        yield running


def on_server(server: RolloutServer, **overlap: Any) -> dict[str, Any]:
    return {"backend": "vllm", "vllm": server.settings(), "overlap": overlap}


def train(
    model: Path,
    scenes: Path,
    output: Path,
    sections: dict[str, Any],
    *,
    environment: dict[str, str] | None = None,
    **flags: Any,
) -> list[dict[str, Any]]:
    """The records of the steps of a run."""
    variant = "stage2_two_channel" if "stage2_ab" in sections else "stage2_rollout_aligned"
    argv = sft_flags(
        model, scenes, output, custom_trainer_variant=variant, coordexp=json.dumps(sections),
        **{"max_steps": STEPS, "learning_rate": 1e-3, "val_dataset": None, **flags},
    )  # fmt: skip
    done = run_swift("sft", *argv, **(environment or {}))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    payloads = [p["metrics"] for p in read_payloads(output / "metrics.jsonl") if p["mode"] == "train"]
    return [metrics for metrics in payloads if "learning_rate" in metrics]


@pytest.fixture(scope="module")
def waiting(server, taught_model, scenes, tmp_path_factory) -> list[dict[str, Any]]:
    """A run that waits for all rollouts of a step before it trains; two samples a forward."""
    output = tmp_path_factory.mktemp("waiting") / "run"
    sections = rollout_aligned(**on_server(server), packing=False)
    return train(
        taught_model, scenes, output, sections,
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip


def assert_same_numbers(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], rel: float) -> None:
    assert len(ours) == len(theirs) == STEPS
    for step, (found, expected) in enumerate(zip(ours, theirs, strict=True)):
        keys = [key for key in expected if key.startswith(SAME)]
        assert len(keys) > 15
        for key in keys:
            assert found[key] == pytest.approx(expected[key], rel=rel, abs=1e-7), (step, key)


def test_a_server_gives_the_run_of_transformers(waiting, taught_model, scenes, tmp_path):
    sections = rollout_aligned(packing=False)
    records = train(
        taught_model, scenes, tmp_path / "run", sections,
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    assert_same_numbers(waiting, records, 1e-4)


def test_training_during_generation_changes_no_number(waiting, server, taught_model, scenes, tmp_path):
    """Chunks of two samples: their forward runs while the next two are answered."""
    sections = rollout_aligned(
        **on_server(server, enabled=True, queue_size=1), decode_batch_size=2, packing=False
    ) | {"debug": {"enabled": True}}
    records = train(
        taught_model, scenes, tmp_path / "run", sections,
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    assert sum(record["rollout/early_forwards"] for record in records) > 0
    assert_same_numbers(records, waiting, 1e-5)
    for record in records:
        atoms = [value for key, value in record.items() if key.startswith("loss/")]
        assert sum(atoms) == pytest.approx(record["loss"], rel=1e-5)


def test_two_ranks_may_train_different_samples_early(waiting, server, taught_model, scenes, tmp_path):
    """Each rank trains what it has while it waits, so they differ in what is left for their common forwards."""
    rollouts = {**on_server(server, enabled=True), "decode_batch_size": 1, "packing_length": 190}
    sections = two_channel(1.0, rollouts)
    environment = {"NPROC_PER_NODE": "2", "MASTER_PORT": free_port()}
    output = tmp_path / "run"
    records = train(
        taught_model, scenes, output, sections, environment=environment,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, train_dataloader_shuffle=True,
    )  # fmt: skip
    assert json.loads((output / "resolved_config.json").read_text())["derived"]["world_size"] == 2
    assert sum(record["rollout/early_forwards"] for record in records) > 0
    for step, (found, expected) in enumerate(zip(records, waiting, strict=True)):
        for key in (
            "loss",
            "grad_norm",
            "rollout/f1",
            "rollout/gt_objects_total",
            "coord_diag/B/expected_bin_mae",
        ):
            assert found[key] == pytest.approx(expected[key], rel=2e-3), (step, key)


def test_overlap_under_deepspeed_is_refused_before_anything_starts(taught_model, scenes, tmp_path):
    nowhere = {"mode": "server", "server": {"servers": [{"base_url": f"http://127.0.0.1:{free_port()}"}]}}
    sections = rollout_aligned(backend="vllm", vllm=nowhere, overlap={"enabled": True})
    plugins = [Path(__file__).with_name("deepspeed_on_cpu_plugin.py"), PLUGIN]
    argv = sft_flags(
        taught_model, scenes, tmp_path / "run", custom_trainer_variant="stage2_rollout_aligned",
        coordexp=json.dumps(sections), deepspeed="zero2", val_dataset=None, use_cpu=None, external_plugins=plugins,
    )  # fmt: skip
    done = run_swift("sft", *argv, NPROC_PER_NODE="2", MASTER_PORT=free_port(), ACCELERATE_USE_CPU="false")
    assert done.returncode != 0
    assert "rollout_matching.overlap.enabled: DeepSpeed keeps gradients in buffers of its own" in done.stderr
