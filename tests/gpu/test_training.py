"""Three steps of stage 1 and of both variants of stage 2 on a device, against the same runs on the CPU; and resuming.

Rollouts by transformers, from a model that was taught on the device. About 150 s on a GPU, all of it start-up.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gpu import Say, needs
from support.gpu_runs import CPU, Records, train
from support.stage2 import rollout_aligned, two_channel

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

VARIANTS: dict[str, dict[str, Any]] = {
    "stage1_coord": {},
    "stage2_rollout_aligned": rollout_aligned(),
    "stage2_two_channel": two_channel(0.34, n_softctx_iter=2),
}
IN_BFLOAT16 = {"torch_dtype": "bfloat16", "bf16": True}


@pytest.fixture(scope="module")
def taught(
    device: torch.device, nano_model: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The nano model after 100 steps on the device: it writes valid answers, many of them wrong."""
    needs("ms-swift")
    output = tmp_path_factory.mktemp("gpu") / "taught"
    terms = {"ce_weight": 0.5, "soft_ce_weight": 0.5, "target_sigma": 8.0}
    train(
        nano_model, scenes, output, device, {"custom": {"coord_soft_ce_w1": terms}}, max_steps=100,
        learning_rate=5e-3, logging_steps=50, save_strategy="steps", save_steps=100, save_only_model=True,
    )  # fmt: skip
    return output / "checkpoint-100"


def gaps(found: Records, expected: Records) -> list[float]:
    """Of the losses, step by step, relative."""
    pairs = zip(found, expected, strict=True)
    return [abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in pairs]


def shown(records: Records) -> str:
    return ", ".join(f"{record['loss']:.4f}" for record in records)


def atoms_gap(record: dict[str, Any]) -> float:
    """Of the sum of the objective's atoms and the loss, relative; 0 where a stage has none."""
    atoms = [value for key, value in record.items() if key.startswith("loss/")]
    return abs(sum(atoms) - record["loss"]) / abs(record["loss"]) if atoms else 0.0


@pytest.mark.parametrize("variant", VARIANTS)
def test_three_steps_are_those_of_the_cpu(
    variant: str, device: torch.device, taught: Path, scenes: Path, tmp_path: Path, say: Say
):
    def run(where: str) -> Records:
        of = device if where == "device" else CPU
        return train(
            taught,
            scenes,
            tmp_path / where,
            of,
            VARIANTS[variant],
            custom_trainer_variant=variant,
            learning_rate=1e-4,
        )

    with ThreadPoolExecutor() as both:
        found, expected = both.map(run, ("device", "cpu"))
    off = gaps(found, expected)
    summed = max(map(atoms_gap, found))
    rollouts = [
        (r["rollout/f1"], e["rollout/f1"]) for r, e in zip(found, expected, strict=True) if "rollout/f1" in r
    ]
    say(
        f"{variant}, float32, losses {shown(found)}, on the CPU {shown(expected)}: off by at most {max(off):.1e}; "
        f"atoms sum to the loss within {summed:.1e}; F1 of rollouts {rollouts}"
    )
    assert len(found) == 3
    assert off[0] < 1e-3
    assert max(off) < 5e-2  # one token answered otherwise changes a target
    assert summed < 1e-4
    assert bool(rollouts) == (variant != "stage1_coord")


def test_bfloat16_steps_are_near_float32(
    device: torch.device, taught: Path, scenes: Path, tmp_path: Path, say: Say
):
    found, expected = (
        train(taught, scenes, tmp_path / name, device, {}, learning_rate=1e-4, **flags)
        for name, flags in {"bf16": IN_BFLOAT16, "float32": {}}.items()
    )
    off = gaps(found, expected)
    say(f"stage 1, bfloat16 {shown(found)}, float32 {shown(expected)}: off by at most {max(off):.1e}")
    assert found != expected
    assert max(off) < 5e-2


def test_a_resumed_run_goes_on_as_the_whole_one(
    device: torch.device, taught: Path, scenes: Path, tmp_path: Path, say: Say
):
    flags = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    whole = train(taught, scenes, tmp_path / "whole", device, {}, **flags)
    rest = train(
        taught,
        scenes,
        tmp_path / "rest",
        device,
        {},
        resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2",
        **flags,
    )
    off = gaps(rest, whole[2:])
    equal = [record["loss"] for record in rest] == [record["loss"] for record in whole[2:]]
    verdict = "equal" if equal else f"off by {max(off):.1e}"
    say(f"steps 3 and 4, resumed {shown(rest)}, whole {shown(whole[2:])}: {verdict}")
    assert equal
