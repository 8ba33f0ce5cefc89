"""Training with the coord-offset adapter through `swift sft`: what is trained, saved, resumed, used and merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.processes import run_swift, sft_flags

from coordexp.inference.infer import infer_file
from coordexp.models.coord_offset import OFFSET_FILE
from coordexp.models.merge_offset import merge_offset

pytestmark = pytest.mark.slow

EMBED = "model.language_model.embed_tokens.weight"
KINDS = {
    "full": {
        "freeze_parameters": ["model.language_model.embed_tokens", "lm_head"],
        "offset": {"enabled": True, "embed_lr": 0.01, "weight_decay": 0.1},
    },
    "lora": {
        "tuner_type": "lora",
        "lora_rank": 4,
        "lora_dropout": 0,
        "target_modules": ["q_proj", "v_proj"],
        "offset": {"enabled": True, "tie_head": False, "embed_lr": 0.01, "head_lr": 0.02},
    },
}


def train(nano: Path, scenes: Path, output: Path, kind: str, **more: object) -> None:
    settings = dict(KINDS[kind])
    offset = settings.pop("offset")
    flags = sft_flags(
        nano, scenes, output, max_steps=3, save_strategy="steps", save_steps=2, train_dataloader_shuffle=False,
        per_device_train_batch_size=4, coordexp=json.dumps({"custom": {"coord_offset": offset}}), **settings | more,
    )  # fmt: skip
    done = run_swift("sft", *flags)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[1:]]
    return [r["metrics"]["loss"] for r in records if "loss" in r["metrics"]]


@pytest.fixture(scope="module", params=list(KINDS))
def run(
    request, nano_model: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    output = tmp_path_factory.mktemp("offset") / request.param
    train(nano_model, scenes, output, request.param)
    return request.param, output


def test_tables_train_with_their_own_rates_on_frozen_rows(run, nano_model: Path):
    kind, output = run
    checkpoint = output / "checkpoint-3"
    tables = load_file(checkpoint / OFFSET_FILE)
    groups = torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"]
    if kind == "full":
        assert tables.keys() == {"coord_ids", "embed"}
        assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups][-1] == (0.01, 0.1, 1)
        before, after = (load_file(p / "model.safetensors")[EMBED] for p in (nano_model, checkpoint))
        assert torch.equal(before, after)
    else:
        assert tables.keys() == {"coord_ids", "embed", "head"}
        assert [(g["lr"], len(g["params"])) for g in groups[-2:]] == [(0.01, 1), (0.02, 1)]
    assert all(g["lr"] == 1e-3 for g in groups[: -(len(tables) - 1)])
    assert all(tables[key].abs().max() > 0.01 for key in tables.keys() - {"coord_ids"})


def test_resumed_run_goes_on_as_if_it_had_not_stopped(run, nano_model: Path, scenes: Path, tmp_path: Path):
    kind, output = run
    train(
        nano_model, scenes, tmp_path / "again", kind, resume_from_checkpoint=output / "checkpoint-2",
        ignore_data_skip=False,
    )  # fmt: skip
    assert losses(tmp_path / "again")[-1] == pytest.approx(losses(output)[-1], rel=1e-6)
    tables = [load_file(path / "checkpoint-3" / OFFSET_FILE) for path in (output, tmp_path / "again")]
    for key, expected in tables[0].items():
        torch.testing.assert_close(tables[1][key], expected, rtol=1e-5, atol=1e-7)


def test_inference_with_the_adapter_is_that_of_the_merged_model(run, scenes: Path, tmp_path: Path):
    _, output = run
    checkpoint = output / "checkpoint-3"
    merge_offset(checkpoint, tmp_path / "merged")
    found = {}
    for name, model in {"adapter": checkpoint, "merged": tmp_path / "merged"}.items():
        infer_file(model, scenes / "val.jsonl", tmp_path / name, limit=2, max_new_tokens=24)
        lines = (tmp_path / name / "pred_token_trace.jsonl").read_text().splitlines()
        found[name] = [json.loads(line) for line in lines]
    for with_adapter, merged in zip(found["adapter"], found["merged"], strict=True):
        assert with_adapter["generated_token_text"] == merged["generated_token_text"]
        assert with_adapter["token_logprobs"] == pytest.approx(merged["token_logprobs"], abs=1e-4)
