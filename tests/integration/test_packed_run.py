"""Real `swift sft` runs on packed samples, under sdpa on a CPU: the numbers of the unpacked run, and those of packs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.processes import free_port, run_swift, sft_flags

pytestmark = pytest.mark.slow

CUSTOM = {
    "coord_soft_ce_w1": {"soft_ce_weight": 0.5, "w1_weight": 2.0, "ce_weight": 0.25, "gate_weight": 1.5},
    "token_type_metrics": {"enabled": True, "include": ["*"]},
}
PACKED = {"custom": CUSTOM, "training": {"packing": True}, "debug": {"enabled": True}}
NUM_TRAIN, NUM_VAL, STEPS = 8, 4, 2
# Every step takes all 8 samples: in one padded batch, or in packs, fewer than the accumulation steps asked for.
PACK_FLAGS = {
    "packing_length": 260, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8,
}  # fmt: skip


def train(
    model: Path, data: Path, output: Path, settings: dict[str, Any], ranks: int = 1, **flags: Any
) -> list[dict]:
    """Metrics of every record of a run."""
    common: dict[str, Any] = {
        "max_steps": STEPS, "train_dataloader_shuffle": False, "eval_strategy": "steps", "eval_steps": STEPS,
        "coordexp": json.dumps(settings),
    }  # fmt: skip
    environment = {"NPROC_PER_NODE": str(ranks), "MASTER_PORT": free_port()} if ranks > 1 else {}
    done = run_swift("sft", *sft_flags(model, data, output, **common | flags), **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    _, *records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [record["metrics"] for record in records]


def steps_of(records: list[dict]) -> list[dict]:
    return [metrics for metrics in records if "loss" in metrics]


def evaluation_of(records: list[dict]) -> dict:
    return next(metrics for metrics in records if "eval_loss" in metrics)


@pytest.fixture(scope="module")
def unpacked(nano_model: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return train(nano_model, scenes, tmp_path_factory.mktemp("run") / "unpacked", {"custom": CUSTOM})


@pytest.fixture(scope="module")
def packed_run(
    nano_model: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict]]:
    output = tmp_path_factory.mktemp("run") / "packed"
    return output, train(
        nano_model, scenes, output, PACKED, save_strategy="steps", save_steps=1, **PACK_FLAGS
    )


@pytest.fixture(scope="module")
def packed(packed_run: tuple[Path, list[dict]]) -> list[dict]:
    return packed_run[1]


EQUAL = (
    "loss", "grad_norm", "base_ce/loss", "coord_diag/loss", "coord_diag/expected_bin_mae", "coord_diag/acc_top5",
    "token_acc", "token_acc_top5", "text_token_acc", "desc_token_frac", "coord_token_frac", "format_token_acc",
    "coord_token_acc_top5", "coord_monitor/flip_text_to_coord", "coord_monitor/coord_vocab_mass_at_gt_coord",
    "coord_monitor/coord_vocab_mass_at_gt_desc", "train/samples_total", "train/samples_seen",
    "train/tokens_total", "train/tokens_seen", "train/images_seen",
)  # fmt: skip


def test_packed_training_has_the_numbers_of_unpacked_training(unpacked: list[dict], packed: list[dict]):
    assert len(steps_of(packed)) == len(steps_of(unpacked)) == STEPS
    for one, other in zip(steps_of(packed), steps_of(unpacked), strict=True):
        assert {key: one[key] for key in EQUAL} == pytest.approx({key: other[key] for key in EQUAL}, rel=1e-4)
    first, reference = steps_of(packed)[0], steps_of(unpacked)[0]
    assert first["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    keys = [f"eval_{key}" for key in EQUAL if f"eval_{key}" in evaluation_of(unpacked)]
    assert {"eval_loss", "eval_base_ce/loss", "eval_token_acc"} <= set(keys)
    for key in keys:
        assert evaluation_of(packed)[key] == pytest.approx(evaluation_of(unpacked)[key], rel=1e-4)


def test_samples_and_micro_steps_are_counted(unpacked: list[dict], packed: list[dict]):
    for step, (one, other) in enumerate(zip(steps_of(packed), steps_of(unpacked), strict=True), start=1):
        num_packs = one["accum/current_grad_steps"]
        assert 1 < num_packs < 8
        assert one["accum/grad_steps"] == 8
        assert one["train/micro_steps"] == num_packs
        assert one["pack/num_samples"] == pytest.approx(NUM_TRAIN / num_packs)
        assert (one["packing/mode"], other["packing/mode"]) == (1, 0)
        num_tokens = one["packing/utilization"] * num_packs * PACK_FLAGS["packing_length"]
        assert num_tokens == pytest.approx(round(num_tokens), abs=1e-4)  # of all samples, in either form
        width = num_tokens / other["packing/utilization"] / NUM_TRAIN
        assert width == pytest.approx(round(width), abs=1e-4)  # of the padded batch
        assert (one["train/samples_total"], one["train/samples_seen"]) == (NUM_TRAIN, step * NUM_TRAIN)
        assert (other["accum/grad_steps"], other["accum/current_grad_steps"], other["pack/num_samples"]) == (
            1,
            1,
            8,
        )
    assert evaluation_of(packed)["eval_accum/grad_steps"] == 8
    assert (
        evaluation_of(packed)["eval_accum/current_grad_steps"]
        == steps_of(packed)[-1]["accum/current_grad_steps"]
    )


PER_SAMPLE = (
    "base_ce/noncoord_tokens_per_sample", "base_ce/loss_per_sample", "coord_diag/coord_tokens_per_sample",
    "coord_diag/loss_per_sample", "stage1/total_loss_per_sample_est",
)  # fmt: skip


def test_numbers_per_sample_follow_their_definitions(unpacked: list[dict], packed: list[dict]):
    for prefix, records in (("", steps_of(packed)), ("eval_", [evaluation_of(packed)])):
        for record in records:
            m = {key.removeprefix(prefix): value for key, value in record.items()}
            samples = m["pack/num_samples"]
            text = m["base_ce/loss"] * m["base_ce/noncoord_tokens"] / samples
            coord = m["coord_diag/loss"] * m["coord_diag/coord_tokens"] / samples
            expected = (
                m["base_ce/noncoord_tokens"] / samples, text, m["coord_diag/coord_tokens"] / samples, coord,
                text + coord,
            )  # fmt: skip
            assert [m[key] for key in PER_SAMPLE] == pytest.approx(expected, rel=1e-5)
    assert not any(key.removeprefix("eval_") in PER_SAMPLE for metrics in unpacked for key in metrics)


def test_samples_seen_and_what_was_watched_go_on_after_a_resume(
    nano_model: Path, scenes: Path, tmp_path: Path, packed_run: tuple[Path, list[dict]]
):
    output, packed = packed_run
    checkpoint = shutil.copytree(output / "checkpoint-1", tmp_path / "checkpoint-1")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    kept = state["stateful_callbacks"]["CoordExpRules"]["attributes"]
    [norm] = kept["usual"]["grad_norm"]
    assert (kept["best"], kept["said"]) == ({}, {})
    kept["best"], kept["said"] = {"eval_rollout/f1": 0.9}, {"truncated": 1}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    saved_at_the_end = {"save_strategy": "steps", "save_steps": 2}
    flags = {"resume_from_checkpoint": checkpoint, "logging_steps": 2, **saved_at_the_end, **PACK_FLAGS}
    resumed = train(nano_model, scenes, tmp_path / "resumed", PACKED, **flags)
    [last] = steps_of(resumed)
    assert (last["train/samples_total"], last["train/samples_seen"]) == (NUM_TRAIN, 2 * NUM_TRAIN)
    assert last["train/tokens_seen"] == steps_of(packed)[-1]["train/tokens_seen"] > last["train/tokens_total"]
    assert last["base_ce/loss"] == pytest.approx(steps_of(packed)[-1]["base_ce/loss"], rel=1e-5)
    [saved] = (tmp_path / "resumed").rglob("checkpoint-2/trainer_state.json")
    later = json.loads(saved.read_text())["stateful_callbacks"]["CoordExpRules"]["attributes"]
    assert (later["best"]["eval_rollout/f1"], later["said"]) == (0.9, kept["said"])
    assert later["usual"]["grad_norm"][0] == norm
    assert len(later["usual"]["grad_norm"]) == 2


def test_two_ranks_share_packs(nano_model: Path, scenes: Path, tmp_path: Path, unpacked: list[dict]):
    flags = {
        **PACK_FLAGS,
        "packing_length": 450,
        "max_steps": 1,
        "eval_strategy": "no",
    }  # two packs, one a rank
    [step] = steps_of(train(nano_model, scenes, tmp_path / "out", PACKED, ranks=2, **flags))
    assert (step["accum/current_grad_steps"], step["pack/num_samples"]) == (1, NUM_TRAIN / 2)
    assert (step["train/samples_total"], step["train/samples_seen"]) == (NUM_TRAIN, NUM_TRAIN)
    assert step["loss"] == pytest.approx(steps_of(unpacked)[0]["loss"], rel=1e-5)
    assert step["grad_norm"] == pytest.approx(steps_of(unpacked)[0]["grad_norm"], rel=1e-4)
