"""Real runs in which memory runs out once: half a chunk of the head, half a batch of an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.processes import PLUGIN, run_swift, sft_flags
from support.tight_runs import TIGHT, tight, vocabulary

pytestmark = pytest.mark.slow

EVALUATING = {
    "eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4,
}  # fmt: skip


def run(
    model: Path, scenes: Path, output: Path, *, head: str, rows: int, times: int, **flags: Any
) -> tuple[list[dict[str, float]], str]:
    """The records of a run of 2 steps, and its console."""
    argv = sft_flags(
        model, scenes, output, max_steps=2, external_plugins=[TIGHT, PLUGIN],
        coordexp=json.dumps({"custom": {"head": head}}), **flags,
    )  # fmt: skip
    done = run_swift("sft", *argv, **tight(vocabulary(model), rows, times))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = (output / "metrics.jsonl").read_text().splitlines()[1:]
    return [json.loads(line)["metrics"] for line in lines], done.stdout + done.stderr


def retries(records: list[dict[str, float]]) -> float:
    return sum(record.get("health/oom_retries_total", 0) for record in records)


@pytest.fixture(scope="module")
def roomy(nano_model: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The records of a run that has all the memory it wants."""
    output = tmp_path_factory.mktemp("runs") / "roomy"
    return run(nano_model, scenes, output, head="plain", rows=8, times=0, **EVALUATING)[0]


def test_half_a_chunk_of_the_head_gives_the_same_losses(
    roomy, nano_model: Path, scenes: Path, tmp_path: Path
):
    tight_, console = run(nano_model, scenes, tmp_path / "tight", head="fused", rows=32, times=1)
    losses = [[record["loss"] for record in records if "loss" in record] for records in (roomy, tight_)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert (retries(roomy), retries(tight_)) == (0, 1)
    assert console.count("the fused head, which computes chunks of rows: memory ran out with pieces of") == 1


def test_half_a_batch_of_an_evaluation_gives_the_same_numbers(
    roomy, nano_model: Path, scenes: Path, tmp_path: Path
):
    tight_, console = run(nano_model, scenes, tmp_path / "tight", head="plain", rows=8, times=1, **EVALUATING)
    assert (retries(roomy), retries(tight_)) == (0, 1)
    evaluations = [[record for record in records if "eval_loss" in record] for records in (roomy, tight_)]
    keys = [
        key for key in evaluations[0][0] if key.startswith(("eval_base_ce", "eval_coord_diag", "eval_loss"))
    ]
    assert len(keys) > 10
    for one, other in zip(*evaluations, strict=True):
        assert {key: other[key] for key in keys} == pytest.approx({key: one[key] for key in keys}, rel=1e-4)
    assert "memory ran out with pieces of 4; tried again with 2, which stays" in console
