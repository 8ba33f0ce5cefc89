"""LoRA on Qwen's own vocabulary, both towers: trained, saved, resumed, merged, answered. About two minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.processes import run_coordexp, run_swift, sft_flags
from support.real_scenes import real_scenes
from support.vllm import require_vllm

from coordexp.cli.main import main
from coordexp.codec.coord_vocab import COORD_TOKENS
from coordexp.config.prompt import PROMPT_FILE
from coordexp.inference.infer import infer_file
from coordexp.models.merge_offset import with_adapter

pytestmark = pytest.mark.slow

LORA: dict[str, Any] = {
    "tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0, "target_modules": ["all-linear"], "freeze_vit": False,
    "freeze_aligner": False,
}  # fmt: skip
OFFSET = {"custom": {"coord_offset": {"enabled": True, "embed_lr": 0.01}}}
KINDS: dict[str, dict[str, Any]] = {
    "offsets": {"coordexp": json.dumps(OFFSET)},
    "DoRA, saved ends": {"use_dora": True, "modules_to_save": ["embed_tokens", "lm_head"]},
}
MAX_PIXELS = 80_000
COORDS = range(151_669, 152_669)

LOGITS = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
for folder in sys.argv[2:]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        save_file({"logits": model(**load_file(sys.argv[1]), use_cache=False).logits}, folder + ".logits")
"""
TOLERANCE = 5e-5
"""Of logits in float32, which are of size 1 to 10."""


class Run(NamedTuple):
    kind: str
    folder: Path
    merged: Path

    @property
    def last(self) -> Path:
        return self.folder / "checkpoint-2"


@pytest.fixture(scope="module")
def start(real_plain_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user starts from: the model of the hub, given its coordinate tokens."""
    path = tmp_path_factory.mktemp("start") / "model"
    assert main(["model", "add-coord-tokens", "--model", str(real_plain_model), "--output", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real_scenes(tmp_path_factory.mktemp("data"))


def train(start: Path, data: Path, output: Path, kind: str, **more: Any) -> None:
    flags = sft_flags(
        start, data, output, max_steps=2, per_device_train_batch_size=2, save_strategy="steps", save_steps=1,
        val_dataset=None, max_pixels=MAX_PIXELS, train_dataloader_shuffle=False, **{**LORA, **KINDS[kind], **more},
    )  # fmt: skip
    done = run_swift("sft", *flags)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


@pytest.fixture(scope="module", params=list(KINDS))
def run(request, start: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("lora")
    train(start, data, folder / "run", request.param)
    found = Run(request.param, folder / "run", folder / "merged")
    assert main(["model", "merge", "--model", str(found.last), "--output", str(found.merged)]) == 0
    return found


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[1:]]
    return [record["metrics"]["loss"] for record in records if "loss" in record["metrics"]]


def adapter(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "adapter_model.safetensors")


def test_adapters_of_both_towers_and_the_merger_train(run: Run):
    """B starts at zero, so that it has moved where it is not; A of step 2 is not A of step 1."""
    first, last = adapter(run.folder / "checkpoint-1"), adapter(run.last)
    assert first.keys() == last.keys()
    for part in ("visual.blocks.0.attn.qkv", "visual.merger.linear_fc1", "visual.deepstack_merger_list.0.linear_fc2",
                 "language_model.layers.0.self_attn.q_proj"):  # fmt: skip
        [up] = [name for name in last if f"{part}.lora_B" in name]
        assert last[up].abs().max() > 5e-4, part
    assert all(not torch.equal(first[name], last[name]) for name in last)


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(run: Run, start: Path, data: Path, tmp_path: Path):
    train(start, data, tmp_path, run.kind, resume_from_checkpoint=run.folder / "checkpoint-1")
    assert losses(tmp_path)[-1] == pytest.approx(losses(run.folder)[-1], rel=1e-6)
    again = adapter(tmp_path / "checkpoint-2")
    for name, expected in adapter(run.last).items():
        torch.testing.assert_close(again[name], expected, rtol=1e-5, atol=1e-7)


def question(start: Path, data: Path) -> dict[str, torch.Tensor]:
    """A picture with half of an answer, as tensors for the model."""
    from swift.template import TemplateInputs

    from coordexp.swift_bridge.checkpoint import load_template

    template = load_template(start)
    template.set_mode("train")
    answer = (
        '{"objects": [{"desc": "猫", "bbox_2d": [<|coord_0|>, <|coord_17|>, <|coord_500|>, <|coord_999|>]}'
    )
    messages = [{"role": "user", "content": "<image>Find all."}, {"role": "assistant", "content": answer}]
    picture = json.loads((data / "val.jsonl").read_text("utf-8").splitlines()[0])["images"][0]
    encoded = template.encode(
        TemplateInputs.from_dict({"messages": messages, "images": [str(data / picture)]})
    )
    return {
        "input_ids": torch.tensor([encoded["input_ids"]]), "pixel_values": encoded["pixel_values"],
        "image_grid_thw": encoded["image_grid_thw"],
        "mm_token_type_ids": (torch.tensor([encoded["input_ids"]]) == 151_655).long(),
    }  # fmt: skip


def test_a_merged_model_has_the_logits_of_the_adapted_one(run: Run, start: Path, data: Path, tmp_path: Path):
    """In a process that knows nothing of this project, float32."""
    from transformers import AutoModelForImageTextToText

    inputs = question(start, data)
    save_file(inputs, tmp_path / "inputs")
    command = [sys.executable, "-c", LOGITS, str(tmp_path / "inputs"), str(run.merged)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    found = load_file(f"{run.merged}.logits")["logits"]
    plain = AutoModelForImageTextToText.from_pretrained(start, dtype=torch.float32).eval()
    with torch.no_grad():
        before = plain(**inputs, use_cache=False).logits
        expected = with_adapter(plain, run.last).eval()(**inputs, use_cache=False).logits
    assert (expected - before).abs().max() > 1000 * TOLERANCE
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def names_of(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        return set(weights.keys())


def test_a_merged_folder_is_one_of_the_base_model(run: Run, start: Path):
    """Names of tensors, files, and what engines read of the configuration."""
    unties = "saved ends" in run.kind
    assert names_of(run.merged) == names_of(start) | ({"lm_head.weight"} if unties else set())
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (run.merged, start))
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is not unties
    assert config["text_config"]["vocab_size"] == before["text_config"]["vocab_size"] == 152_704
    files = {path.name for path in start.iterdir()} - {"coordexp_coord_tokens.json"}
    assert {path.name for path in run.merged.iterdir()} == files | {PROMPT_FILE}


def test_tokenizer_and_template_differ_from_the_hubs_model_by_the_coordinate_tokens_alone(
    run: Run, real_plain_model: Path
):
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (run.merged / name).read_bytes() == (real_plain_model / name).read_bytes(), name
    ours, plain = (
        json.loads((folder / "tokenizer.json").read_text("utf-8"))
        for folder in (run.merged, real_plain_model)
    )
    added = ours["added_tokens"]
    coords = [(token["content"], token["id"]) for token in added if token["id"] in COORDS]
    assert coords == list(zip(COORD_TOKENS, COORDS, strict=True))
    ours["added_tokens"] = [token for token in added if token["id"] not in COORDS]
    assert ours == plain
    limits, before = (
        json.loads((folder / "processor_config.json").read_text())
        for folder in (run.merged, real_plain_model)
    )
    assert limits["image_processor"]["size"].pop("longest_edge") == MAX_PIXELS
    del before["image_processor"]["size"]["longest_edge"]
    assert limits == before


def traces(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "pred_token_trace.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.vllm
def test_adapters_merged_model_and_vllm_give_the_same_answers(run: Run, data: Path, tmp_path: Path):
    """Greedy, float32: the checkpoint as it is and merged by transformers, merged by vLLM."""
    require_vllm()
    found = {}
    for name, model in {"adapters": run.last, "merged": run.merged}.items():
        infer_file(model, data / "train.jsonl", tmp_path / name, max_new_tokens=24)
        found[name] = traces(tmp_path / name)
    done = run_coordexp(
        "infer", "--model", run.merged, "--data", data / "train.jsonl", "--output", tmp_path / "vllm", "--backend",
        "vllm", "--max-new-tokens", 24, "--batch-size", 2, "--max-model-len", 512,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found["vllm"] = traces(tmp_path / "vllm")
    assert len({tuple(trace["token_logprobs"]) for trace in found["adapters"]}) == 4  # the picture matters
    for name in ("merged", "vllm"):
        for ours, theirs in zip(found["adapters"], found[name], strict=True):
            assert theirs["generated_token_text"] == ours["generated_token_text"], name
            assert theirs["num_prompt_tokens"] == ours["num_prompt_tokens"], name
            assert theirs["token_logprobs"] == pytest.approx(ours["token_logprobs"], abs=1e-4)
