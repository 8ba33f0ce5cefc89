"""How a run takes up the coord-offset adapter: where it starts from, its parameter groups, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.stage1_head import load, with_lora

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.config.schema.custom import CoordOffset as OffsetSettings
from coordexp.errors import ConfigError
from coordexp.models.coord_offset import attach_coord_offset, coord_offset_of, save_coord_offset
from coordexp.swift_bridge.arguments import read_load_flags
from coordexp.trainers.offset_training import (
    OffsetTraining,
    preparation,
    refuse_unmerged,
    restore_for_inference,
)

ONE_TABLE, TWO_TABLES = OffsetSettings(enabled=True), OffsetSettings(enabled=True, tie_head=False)


@pytest.fixture(scope="module")
def tokenizer(nano: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(nano)


@pytest.fixture
def checkpoint(nano: Path, tokenizer, tmp_path: Path):
    """Write a checkpoint whose embedding table is filled with a number."""

    def write(name: str, value: float) -> Path:
        model = load(nano)
        offset = attach_coord_offset(model, CoordVocab.from_tokenizer(tokenizer).ids, tie_head=True)
        torch.nn.init.constant_(offset.embedding.coord_offset_KH, value)
        (tmp_path / name).mkdir()
        save_coord_offset(model, tmp_path / name)
        return tmp_path / name

    return write


def test_a_run_starts_from_the_first_checkpoint_that_holds_tables(nano, tokenizer, checkpoint):
    resumed, warm = checkpoint("resumed", 2.0), checkpoint("warm", 3.0)
    for folders, expected in {(None,): 0.0, (None, str(warm)): 3.0, (str(resumed), str(warm)): 2.0}.items():
        model = load(nano)
        preparation(ONE_TABLE, folders)(model, tokenizer, nano)
        assert torch.all(coord_offset_of(model).embedding.coord_offset_KH == expected)


def test_a_model_folder_with_tables_is_a_start_too(nano, tokenizer, checkpoint):
    model_dir = checkpoint("model", 4.0)
    for prepare in (preparation(ONE_TABLE, ()), restore_for_inference):
        model = load(nano)
        prepare(model, tokenizer, model_dir)
        assert torch.all(coord_offset_of(model).head.coord_offset_KH == 4.0)


def test_tables_are_never_dropped_silently(nano, tokenizer, checkpoint):
    folder = checkpoint("trained", 1.0)
    with pytest.raises(
        ConfigError, match=r"custom\.coord_offset\.enabled is false; set it to true, or merge"
    ):
        preparation(OffsetSettings(), (str(folder),))(load(nano), tokenizer, nano)
    with pytest.raises(ConfigError, match=r"run `coordexp model merge --model .*trained"):
        refuse_unmerged(
            read_load_flags(["--merge_lora", "true", "--adapters", str(nano), str(folder)]).adapters
        )
    refuse_unmerged(read_load_flags(["--model", str(folder)]).adapters)


def test_without_the_adapter_the_model_stays_as_it_is(nano, tokenizer):
    model = load(nano)
    preparation(OffsetSettings(), (None,))(model, tokenizer, nano)
    assert type(model.lm_head) is torch.nn.Linear


def test_tables_get_groups_of_their_own(nano, tokenizer):
    settings = OffsetSettings(enabled=True, tie_head=False, head_lr=0.5, weight_decay=0.25)
    model = load(nano)
    preparation(settings, ())(model, tokenizer, nano)
    model = with_lora(model, target_modules=["q_proj"])
    offsets = OffsetTraining(model, settings, 0.125, deepspeed=None)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": trained, "weight_decay": 0.0}], lr=0.125)
    offsets.use_own_rates(optimizer)
    tables = coord_offset_of(model).tables
    groups = [(g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
    assert groups == [(0.125, 0.0, len(trained) - 2), (0.125, 0.25, 1), (0.5, 0.25, 1)]
    assert optimizer.param_groups[1]["params"][0] is tables["embed"]
    assert optimizer.param_groups[2]["params"][0] is tables["head"]
    assert all("lora" in n or "coord_offset" in n for n, p in model.named_parameters() if p.requires_grad)


def test_tables_alone_leave_no_empty_group(nano, tokenizer):
    model = load(nano).requires_grad_(False)
    preparation(ONE_TABLE, ())(model, tokenizer, nano)
    offsets = OffsetTraining(model, ONE_TABLE, 0.125, deepspeed=None)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.125)
    offsets.use_own_rates(optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]


def test_runs_that_cannot_train_the_tables_as_asked_are_refused(nano, tokenizer):
    with pytest.raises(ConfigError, match="the loaded model has no adapter"):
        OffsetTraining(load(nano), ONE_TABLE, 0.1, deepspeed=None)
    model = load(nano)
    preparation(ONE_TABLE, ())(model, tokenizer, nano)
    with pytest.raises(ConfigError, match="the DeepSpeed configuration has an `optimizer`"):
        OffsetTraining(model, ONE_TABLE, 0.1, deepspeed={"optimizer": {"type": "AdamW"}})


def test_saved_tables_come_back(nano, tokenizer, tmp_path):
    model = load(nano)
    preparation(TWO_TABLES, ())(model, tokenizer, nano)
    offsets, table_KH = (
        OffsetTraining(model, TWO_TABLES, 0.1, deepspeed=None),
        coord_offset_of(model).tables["head"],
    )
    torch.nn.init.constant_(table_KH, 7.0)
    offsets.save(tmp_path, None)
    torch.nn.init.zeros_(table_KH)
    offsets.restore(tmp_path)
    assert torch.all(table_KH == 7.0)
    with pytest.raises(ConfigError, match="it is no checkpoint of this run"):
        offsets.restore(nano)
