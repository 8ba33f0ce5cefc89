"""Checkpoints of adapters become plain models: every kind of LoRA that ms-swift trains, with and without offsets.

Each model is loaded in a fresh process. Takes about half a minute, most of it imports.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.stage1_head import Batch, load, with_lora
from torch import Tensor, nn
from transformers import AutoProcessor

from coordexp.config import Prompt
from coordexp.config.prompt import read_prompt, write_prompt
from coordexp.image_size import PixelLimits
from coordexp.models.coord_offset import attach_coord_offset, save_coord_offset
from coordexp.models.merge_offset import merge_offset
from coordexp.models.model_files import PROCESSOR_FILES, TOKENIZER_FILES

TEXT = ["q_proj", "o_proj", "gate_proj"]
ALL_LINEAR = r".*\.(q_proj|o_proj|gate_proj|qkv|proj|linear_fc1|linear_fc2)$"
"""Both towers and the mergers, as `target_modules: all-linear` with freeze_vit and freeze_aligner false."""

KINDS: dict[str, dict[str, Any]] = {
    "text": {"target_modules": TEXT},
    "both towers": {"target_modules": ALL_LINEAR},
    "DoRA": {"target_modules": ALL_LINEAR, "use_dora": True},
    "head": {"target_modules": [*TEXT, "lm_head"]},
    "embedding and head": {"target_modules": [*TEXT, "embed_tokens", "lm_head"]},
    "saved embedding and head": {"target_modules": TEXT, "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved head": {"target_modules": TEXT, "modules_to_save": ["lm_head"]},
    "saved merger": {"target_modules": TEXT, "modules_to_save": ["merger"]},
    "offsets": {"target_modules": TEXT, "offsets": True},
    "offsets, DoRA": {"target_modules": ALL_LINEAR, "use_dora": True, "offsets": True},
    "offsets, head": {"target_modules": [*TEXT, "lm_head"], "offsets": True},
    "trained tokens": {"target_modules": TEXT, "trainable_token_indices": {"embed_tokens": [700, 800]}},
}
UNTIED_BY = {"head", "embedding and head", "saved embedding and head", "saved head", "offsets, head"}
"""Kinds that give embedding and head, one matrix before, different values."""

FRESH = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
inputs = load_file(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.no_grad():
        save_file({"logits": model(**inputs, use_cache=False).logits}, folder + ".logits")
"""


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(**batch.inputs, use_cache=False).logits


def tensor_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        return set(weights.keys())


def adapted(base: Path, batch: Batch, *, offsets: bool = False, **lora: Any) -> tuple[nn.Module, Tensor]:
    """A model with adapters that are far from zero, and its logits."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(base)
    if offsets:
        offset = attach_coord_offset(model, batch.columns.ids, tie_head=True)
        offset.embedding.coord_offset_KH.data.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    before = logits_of(model.eval(), batch)
    model = with_lora(model, **lora)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("modules_to_save" in name or "trainable_tokens" in name):
            parameter.data.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
            )
    logits = logits_of(model.eval(), batch)
    assert (logits - before).abs().max() > 0.05
    return model, logits


class Merged:
    """A model folder, one merged folder for each kind, and what their logits must be."""

    def __init__(self, base: Path, batch: Batch, work: Path) -> None:
        self.base, self.folders, self.expected = base, {}, {}
        self.unties = {}
        for number, (kind, settings) in enumerate(KINDS.items()):
            model, self.expected[kind] = adapted(base, batch, **settings)
            checkpoint = work / f"checkpoint-{number}"
            model.peft_config["default"].base_model_name_or_path = str(base)
            model.save_pretrained(checkpoint)
            save_coord_offset(model, checkpoint)
            self.folders[kind] = work / f"merged-{number}"
            self.unties[kind] = merge_offset(checkpoint, self.folders[kind])
        save_file(batch.inputs, work / "inputs")
        files = [str(work / "inputs"), *map(str, self.folders.values())]
        subprocess.run([sys.executable, "-c", FRESH, *files], check=True, capture_output=True, timeout=300)

    def found(self, kind: str) -> Tensor:
        return load_file(f"{self.folders[kind]}.logits")["logits"]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def merged(request, nano: Path, batch: Batch, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    base, tied = nano, request.param
    if not tied:
        base = tmp_path_factory.mktemp("untied") / "model"
        load(nano, tied=False).save_pretrained(base)
        AutoProcessor.from_pretrained(nano).save_pretrained(base)
    found = Merged(base, batch, tmp_path_factory.mktemp("merged"))
    found.is_tied = tied
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_logits_in_a_fresh_process_are_those_of_the_adapted_model(merged: Merged, kind: str):
    torch.testing.assert_close(merged.found(kind), merged.expected[kind], rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_have_the_names_of_the_base_model(merged: Merged, kind: str):
    unties = merged.is_tied and kind in UNTIED_BY
    assert merged.unties[kind] is unties
    assert tensor_names(merged.folders[kind]) == tensor_names(merged.base) | (
        {"lm_head.weight"} if unties else set()
    )
    config = json.loads((merged.folders[kind] / "config.json").read_text())
    tied = merged.is_tied and not unties
    # vLLM looks at the text model's configuration, transformers at the whole model's.
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is tied


def test_all_other_files_are_those_of_the_base_model(merged: Merged):
    names = {"config.json", "generation_config.json", "model.safetensors"}
    for kind, folder in merged.folders.items():
        beside = {path.name for path in merged.base.iterdir()} & {*TOKENIZER_FILES, *PROCESSOR_FILES}
        assert {"tokenizer.json", "chat_template.jinja", "processor_config.json"} <= beside
        assert {path.name for path in folder.iterdir()} == beside | names, kind
        for name in beside | {"generation_config.json"}:
            assert (folder / name).read_bytes() == (merged.base / name).read_bytes(), (kind, name)


def test_the_dtype_of_the_weights_stays(nano: Path, batch: Batch, tmp_path: Path):
    load(nano).bfloat16().save_pretrained(tmp_path / "base")
    AutoProcessor.from_pretrained(nano).save_pretrained(tmp_path / "base")
    model = with_lora(load(tmp_path / "base"), **KINDS["both towers"])
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "checkpoint")
    merge_offset(tmp_path / "checkpoint", tmp_path / "merged")
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {
        torch.bfloat16
    }


def test_the_prompt_and_its_limits_of_pictures_come_along(nano: Path, tmp_path: Path):
    model = with_lora(load(nano), target_modules=TEXT)
    model.peft_config["default"].base_model_name_or_path = str(nano)
    model.save_pretrained(tmp_path / "checkpoint")
    prompt = Prompt(user="Find all.", system="S", min_pixels=2048, max_pixels=8192, rendered="whole")
    write_prompt(tmp_path / "checkpoint", prompt)
    merge_offset(tmp_path / "checkpoint", tmp_path / "merged")
    assert read_prompt(tmp_path / "merged").prompt == prompt
    assert PixelLimits.of_folder(tmp_path / "merged") == PixelLimits(2048, 8192, 16)
    found, before = (
        json.loads((folder / "processor_config.json").read_text()) for folder in (tmp_path / "merged", nano)
    )
    found["image_processor"].pop("size"), before["image_processor"].pop("size")
    assert found == before
