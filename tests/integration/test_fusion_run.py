"""Training on a mixture of two data sets: whose samples come when, and the numbers of each, in both stages."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.processes import PLUGIN, free_port, run_swift, sft_flags
from support.stage2 import rollout_aligned, two_channel

from coordexp.files import read_json, read_jsonl
from coordexp.metrics.sinks import read_payloads

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
NAMES = ("many", "few")


@pytest.fixture(scope="module")
def sources(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """5 scenes in two shards and 3 in another file, 3 to 1; 3 and 1 for validation."""
    folder = tmp_path_factory.mktemp("mixture")
    lines: dict[str, list[str]] = {}
    for split in ("train", "val"):
        rows = [row for _, row in read_jsonl(scenes / f"{split}.jsonl")]
        for row in rows:
            row["images"] = [str(scenes / image) for image in row["images"]]
        lines[split] = [json.dumps(row) + "\n" for row in rows]
    parts = {
        "many-1.jsonl": lines["train"][:3], "many-2.jsonl": lines["train"][3:5], "few.jsonl": lines["train"][5:],
        "many.val.jsonl": lines["val"][:3], "few.val.jsonl": lines["val"][3:],
    }  # fmt: skip
    for name, written in parts.items():
        (folder / name).write_text("".join(written))
    many = {"train_jsonl": f"{folder}/many-*.jsonl", "val_jsonl": f"{folder}/many.val.jsonl", "weight": 3.0}
    few = {"train_jsonl": [f"{folder}/few.jsonl"], "val_jsonl": f"{folder}/few.val.jsonl", "weight": 1.0}
    return {"sources": [{"name": "many", **many}, {"name": "few", **few}]}


def train(
    model: Path, fusion: dict[str, Any], output: Path, sections: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None, **flags: Any,
) -> tuple[dict[tuple[int, int], str], Path]:  # fmt: skip
    """The id of the sample at every draw, and the run folder."""
    folder = Path(fusion["sources"][1]["train_jsonl"][0]).parent
    files = [folder / name for name in ("many-1.jsonl", "many-2.jsonl", "few.jsonl")]
    samples_file = output.with_suffix(".jsonl")
    custom = {"fusion": fusion, **(sections or {}).get("custom", {})}
    argv = sft_flags(
        model, folder, output, dataset=files, val_dataset=[folder / "many.val.jsonl", folder / "few.val.jsonl"],
        external_plugins=[PLUGIN, HERE / "watch_samples_plugin.py", HERE / "watch_steps_plugin.py"],
        coordexp=json.dumps({**(sections or {}), "custom": custom}), **flags,
    )  # fmt: skip
    done = run_swift("sft", *argv, SAMPLES_FILE=str(samples_file), **(environment or {}))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    lines = [line for _, line in read_jsonl(samples_file)]
    return {(line["epoch"], line["index"]): Path(line["id"]).name for line in lines}, output


def records(run: Path, mode: str = "train") -> list[dict[str, float]]:
    """The metrics of every step, or of every evaluation."""
    payloads = [p["metrics"] for p in read_payloads(run / "metrics.jsonl") if p["mode"] == mode]
    return payloads if mode == "eval" else [metrics for metrics in payloads if "learning_rate" in metrics]


def check_parts_add_up(metrics: dict[str, float], prefix: str = "") -> None:
    """Losses weighted with their token counts, and the counts, are those of the whole."""
    for loss, tokens in (
        ("base_ce/loss", "base_ce/noncoord_tokens"),
        ("coord_diag/loss", "coord_diag/coord_tokens"),
    ):
        of_parts = [
            (
                metrics.get(f"{prefix}dataset/{name}/{loss}"),
                metrics.get(f"{prefix}dataset/{name}/{tokens}", 0),
            )
            for name in NAMES
        ]
        assert all((value is None) == (count == 0) for value, count in of_parts)  # absent is not zero
        assert sum(count for _, count in of_parts) == pytest.approx(metrics[prefix + tokens])
        whole = metrics[prefix + loss] * metrics[prefix + tokens]
        assert sum((value or 0) * count for value, count in of_parts) == pytest.approx(whole, rel=1e-5)
        assert of_parts[0][0] != of_parts[1][0]


FLAGS: dict[str, Any] = {
    "max_steps": 5, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "save_strategy": "steps",
    "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3, "dataloader_num_workers": 2,
    "dataloader_persistent_workers": True, "metric_for_best_model": "eval_dataset/few/loss",
    "callbacks": "forbid_sync",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(nano_model, sources, tmp_path_factory):
    """Two steps of 8 an epoch (12 samples, filled up to whole steps)."""
    output = tmp_path_factory.mktemp("fusion") / "whole"
    return train(nano_model, {**sources, "samples_per_epoch": 12}, output, **FLAGS)


def test_every_step_holds_the_shares(whole):
    samples, _ = whole
    assert {epoch for epoch, _ in samples} == {0, 1, 2}
    run = [samples[epoch, index] for epoch in (0, 1) for index in range(16)]
    for step in range(4):
        names = Counter(sample.split(".")[0].split("-")[0] for sample in run[8 * step : 8 * step + 8])
        assert names == {"many": 6, "few": 2}
    few = [sample for sample in run if sample.startswith("few")]
    assert [sorted(few[:3]), sorted(few[3:6])] == [[f"few.jsonl:{line}" for line in (1, 2, 3)]] * 2


def test_a_run_killed_inside_an_epoch_goes_on_with_the_same_samples(whole, nano_model, sources, tmp_path):
    samples, output = whole
    again, resumed = train(
        nano_model, {**sources, "samples_per_epoch": 12}, tmp_path / "again",
        **FLAGS | {"resume_from_checkpoint": output / "checkpoint-3", "dataloader_num_workers": 0,
                   "dataloader_persistent_workers": False},
    )  # fmt: skip
    # Step 3 is the first of the second epoch; workers of the whole run may have fetched more than was trained.
    wanted = {key: sample for key, sample in samples.items() if (1, 8) <= key < (2, 8)}
    assert {key: sample for key, sample in again.items() if key < (2, 8)} == wanted
    assert [m["loss"] for m in records(resumed)] == pytest.approx(
        [m["loss"] for m in records(output)][3:], rel=1e-5
    )
    assert records(resumed)[-1]["dataset/many/samples_seen"] == 30


def test_numbers_of_each_data_set(whole):
    _, output = whole
    for step, metrics in enumerate(records(output), start=1):
        check_parts_add_up(metrics)
        assert metrics["dataset/many/samples_total"] == 6
        assert metrics["dataset/few/samples_seen"] == 2 * step
        assert (metrics["dataset/many/share"], metrics["dataset/few/share"]) == (0.75, 0.25)
    evaluated = records(output, "eval")[0]
    check_parts_add_up(evaluated, "eval_")
    few = [evaluated[f"eval_dataset/few/{key}"] for key in ("base_ce/loss", "coord_diag/loss")]
    assert evaluated["eval_dataset/few/loss"] == pytest.approx(sum(few))
    state = read_json(output / "checkpoint-3" / "trainer_state.json")
    assert state["best_metric"] == pytest.approx(evaluated["eval_dataset/few/loss"])


def test_packed(nano_model, sources, tmp_path):
    sections = {"training": {"packing": True}}
    samples, output = train(
        nano_model, {**sources, "samples_per_epoch": 12}, tmp_path / "packed", sections, max_steps=3,
        packing_length=300, per_device_train_batch_size=1, gradient_accumulation_steps=4,
        eval_strategy="steps", eval_steps=2, callbacks="forbid_sync",
    )  # fmt: skip
    assert max(epoch for epoch, _ in samples) >= 1
    first, second = ({i: name for (epoch, i), name in samples.items() if epoch == e} for e in (0, 1))
    assert first.keys() == set(range(12))
    assert any(first[index] != second[index] for index in second)
    for metrics in records(output):
        check_parts_add_up(metrics)
        assert metrics["pack/num_samples"] > 1
        assert (
            sum(metrics.get(f"dataset/{name}/samples_total", 0) for name in NAMES)
            == metrics["train/samples_total"]
        )
    check_parts_add_up(records(output, "eval")[0], "eval_")


def test_two_ranks_of_which_one_may_lack_a_data_set(whole, nano_model, sources, tmp_path):
    """The same steps of 8 samples on two ranks, 4 each: rank 1 takes every second sample."""
    ranks = {"NPROC_PER_NODE": "2", "MASTER_PORT": free_port()}
    flags = FLAGS | {"max_steps": 2, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}
    _, output = train(
        nano_model, {**sources, "samples_per_epoch": 12}, tmp_path / "two", environment=ranks,
        **flags | {"eval_steps": 2, "dataloader_num_workers": 0, "dataloader_persistent_workers": False},
    )  # fmt: skip
    for one, two in zip(records(whole[1]), records(output), strict=False):
        keys = [
            f"dataset/{name}/{key}" for name in NAMES for key in ("base_ce/loss", "samples_seen", "share")
        ]
        assert [two[key] for key in keys] == pytest.approx([one[key] for key in keys], rel=1e-4)


@pytest.mark.parametrize("variant", ["stage2_rollout_aligned", "stage2_two_channel"])
def test_stage2(variant, taught_model, sources, tmp_path):
    sections = rollout_aligned() if variant == "stage2_rollout_aligned" else two_channel(1.0)
    flags: dict[str, Any] = {
        "max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "custom_trainer_variant": variant,
        "metric_for_best_model": "eval_dataset/few/rollout/f1", "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip
    samples, output = train(taught_model, sources, tmp_path / "out", sections, **flags)
    assert Counter(sample.split(".")[0].split("-")[0] for sample in samples.values()) == {"many": 6, "few": 2}
    (step,) = records(output)
    (evaluated,) = records(output, "eval")
    for metrics, prefix, keys in (
        (step, "", ("gt_objects_total", "valid_pred_objects_total", "matched_for_supervision")),
        (evaluated, "eval_", ("gt_objects", "pred_objects", "matched")),
    ):
        for key in keys:
            of_parts = [metrics[f"{prefix}dataset/{name}/rollout/{key}"] for name in NAMES]
            assert sum(of_parts) == metrics[f"{prefix}rollout/{key}"]
        for name in NAMES:
            there, found, matched = (metrics[f"{prefix}dataset/{name}/rollout/{key}"] for key in keys)
            f1 = 2 * matched / (there + found) if there + found else 1.0
            assert metrics[f"{prefix}dataset/{name}/rollout/f1"] == pytest.approx(f1)
    assert evaluated["eval_dataset/few/rollout/mAP"] >= 0
    assert step["dataset/few/share"] == 0.25
    assert "best_metric" in read_json(output / "checkpoint-1" / "trainer_state.json")
