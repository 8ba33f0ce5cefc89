"""resolved_config.json: its hash, its derived numbers, and how it is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordexp.config import config_hash, derive, parse_sections, resolved_config, write_resolved
from coordexp.config.run.resolved import id_ranges

SWIFT: dict[str, Any] = {"model": "m", "learning_rate": 1e-4, "max_steps": 100}


def hash_of(ours: dict[str, Any] | None = None, variant: str = "stage1_coord", **swift: Any) -> str:
    return config_hash(variant, parse_sections(ours or {}), {**SWIFT, **swift})


@pytest.mark.parametrize(
    "context",
    [
        {"run_name": "x"},
        {"seed": 7, "data_seed": 8},
        {"output_dir": "elsewhere", "logging_dir": "there", "add_version": False},
        {"report_to": ["wandb"], "swanlab_project": "p"},
        {"resume_from_checkpoint": "checkpoint-5"},
        {"hub_token": "secret"},
        {"weight_decay": 0.1},  # its default
        {"external_plugins": ["a.py"]},
    ],
)
def test_hash_ignores_run_context_and_values_at_their_default(context: dict[str, Any]) -> None:
    assert hash_of(**context) == hash_of()


def test_hash_ignores_key_order_notes_and_where_the_data_is_named() -> None:
    assert config_hash("stage1_coord", parse_sections({}), dict(reversed(SWIFT.items()))) == hash_of()
    assert hash_of({"experiment": {"notes": "n"}}) == hash_of()
    assert hash_of({"custom": {"trainer_variant": "stage1"}}) == hash_of()
    assert hash_of({"custom": {"coord_soft_ce_w1": {"target_sigma": 2.0}}}) == hash_of()


@pytest.mark.parametrize(
    ("ours", "swift"),
    [
        ({}, {"learning_rate": 2e-4}),
        ({}, {"dataset": ["a.jsonl"]}),
        ({}, {"weight_decay": 0.2}),
        ({"custom": {"coord_soft_ce_w1": {"target_sigma": 2.5}}}, {}),
        ({"custom": {"prompt": "Find them."}}, {}),
        ({"custom": {"object_ordering": "random"}}, {}),
    ],
)
def test_hash_sees_what_changes_training(ours: dict[str, Any], swift: dict[str, Any]) -> None:
    assert hash_of(ours, **swift) != hash_of()


def test_derived_numbers_by_hand() -> None:
    derived = derive(
        world_size=4,
        per_device_batch_size=2,
        gradient_accumulation_steps=3,
        num_train_samples=100,
        num_epochs=2.0,
        max_steps=-1,
        num_b_steps=lambda before: before * 3 // 10,
        coord_token_ids=range(151700, 152700),
    )
    assert derived == {
        "world_size": 4,
        "per_device_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "effective_batch_size": 24,
        "num_train_samples": 100,
        "steps_per_epoch": 5,  # ceil(100 / 24)
        "total_steps": 10,
        "channel_b_steps": 3,
        "coord_token_ids": [[151700, 152699]],
    }


def test_steps_of_an_epoch_are_those_of_a_rank() -> None:
    sizes = {"world_size": 2, "per_device_batch_size": 2, "gradient_accumulation_steps": 4}
    # 19 samples: 9 a rank, in 5 batches (4 full ones), in 2 steps (1)
    assert derive(**sizes, num_train_samples=19)["steps_per_epoch"] == 2
    assert derive(**sizes, num_train_samples=19, drop_last=True)["steps_per_epoch"] == 1
    assert derive(**sizes, num_train_samples=17)["steps_per_epoch"] == 1  # 8 a rank


def test_max_steps_is_the_horizon_when_it_is_set() -> None:
    sizes = {"world_size": 1, "per_device_batch_size": 2, "gradient_accumulation_steps": 1}
    assert derive(**sizes, max_steps=7, num_train_samples=100, num_epochs=3.0)["total_steps"] == 7
    assert "total_steps" not in derive(**sizes, max_steps=-1)


@pytest.mark.parametrize(
    ("ids", "expected"), [([], []), ([5, 6, 7, 9], [[5, 7], [9, 9]]), ([3, 2, 1], [[3, 3], [2, 2], [1, 1]])]
)
def test_id_ranges(ids: list[int], expected: list[list[int]]) -> None:
    assert id_ranges(ids) == expected


def test_written_file_holds_everything_but_secrets(tmp_path: Path) -> None:
    sections = parse_sections({"custom": {"head": "plain"}, "experiment": {"title": "t"}})
    swift = {**SWIFT, "hub_token": "hf_very_secret", "swanlab_token": None}
    resolved = resolved_config(
        "stage1_coord",
        sections,
        swift,
        derived={"world_size": 1},
        sources={"custom.head": "run.yaml:3"},
        context={"command": "swift sft --hub_token hf_very_secret"},
    )
    path = write_resolved(tmp_path / "new" / "run", resolved)
    text = path.read_text()
    assert "hf_very_secret" not in text
    content = json.loads(text)
    assert path.name == "resolved_config.json"
    assert content["config_hash"] == config_hash("stage1_coord", sections, swift)
    assert content["trainer_variant"] == "stage1_coord"
    assert content["custom"]["head"] == "plain"
    assert content["custom"]["coord_soft_ce_w1"]["target_sigma"] == 2.0
    assert content["swift"] == {**SWIFT, "hub_token": "***", "swanlab_token": None}
    assert content["derived"] == {"world_size": 1}
    assert (content["experiment"]["title"], content["context"]) == (
        "t",
        {"command": "swift sft --hub_token ***"},
    )
    assert content["sources"] == {"custom.head": "run.yaml:3"}
    assert [file.name for file in path.parent.iterdir()] == ["resolved_config.json"]
