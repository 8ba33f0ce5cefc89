"""Coordinate tokens on a checkpoint of Qwen's shape: 151,936 rows, of which 267 are free. Takes about a minute."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.stage1_head import with_lora
from transformers import AutoModelForImageTextToText, AutoProcessor

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.models.coord_offset import attach_coord_offset, save_coord_offset
from coordexp.models.coord_tokens import add_coord_tokens
from coordexp.models.merge_offset import merge_offset
from coordexp.models.tiny import PRESETS, build_tiny_model

NUM_OLD, OLD_ROWS = 151_669, 151_936
TEXT = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Find a caf\u00e9 \u732b.<|im_end|>\n"
    '<|im_start|>assistant\n{"objects": [{"desc": "cat", "bbox_2d": ['
)
COORDS = "<|coord_0|>, <|coord_266|>, <|coord_267|>, <|coord_999|>]}]}<|im_end|>"
FRESH = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
for model_dir, out in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
    model = AutoModelForImageTextToText.from_pretrained(model_dir).eval()
    with torch.no_grad():
        logits = model(**load_file(sys.argv[1])).logits
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    save_file({"logits": logits, "tied": torch.tensor(tied)}, out)
"""


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def tied(request):
    return request.param


@pytest.fixture(scope="module")
def plain_dir(tied, real_plain_model, tmp_path_factory) -> Path:
    if tied:
        return real_plain_model
    path = tmp_path_factory.mktemp("untied") / "plain"
    build_tiny_model(path, size=replace(PRESETS["real-vocab"], tied=False), coord_tokens=False)
    return path


@pytest.fixture(scope="module")
def expanded_dir(plain_dir, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("expanded") / "model"
    assert add_coord_tokens(plain_dir, path) == (1000, True)
    return path


def load(path):
    return AutoModelForImageTextToText.from_pretrained(path).eval()


def inputs_of(path, text):
    processor = AutoProcessor.from_pretrained(path)
    return dict(processor(text=[text], images=[Image.new("RGB", (96, 320), "teal")], return_tensors="pt"))


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def test_the_padded_matrix_grows_by_what_is_needed_and_old_rows_keep_their_bits(
    plain_dir, expanded_dir, tied
):
    plain, expanded = load(plain_dir), load(expanded_dir)
    assert plain.get_input_embeddings().num_embeddings == OLD_ROWS
    assert NUM_OLD + 1000 <= expanded.get_input_embeddings().num_embeddings == 152_704 == 64 * 2386
    assert expanded.config.text_config.vocab_size == expanded.lm_head.weight.shape[0] == 152_704
    assert (expanded.lm_head.weight is expanded.get_input_embeddings().weight) is tied
    assert expanded.config.tie_word_embeddings is expanded.config.text_config.tie_word_embeddings is tied
    for module in ("get_input_embeddings", "get_output_embeddings"):
        before, after = getattr(plain, module)().weight, getattr(expanded, module)().weight
        assert torch.equal(after[:NUM_OLD], before[:NUM_OLD])
        new = after[NUM_OLD : NUM_OLD + 1000]
        assert len(new.unique(dim=0)) == 1000
        assert not torch.equal(new[:267], before[NUM_OLD:])  # rows that were padding are initialized too
        assert torch.allclose(new.mean(dim=0), before[:NUM_OLD].mean(dim=0), atol=0.02)


def test_ids_are_contiguous_behind_qwens_own_and_nothing_else_of_the_tokenizer_changes(
    plain_dir, expanded_dir
):
    old, new = (json.loads((d / "tokenizer.json").read_text("utf-8")) for d in (plain_dir, expanded_dir))
    assert new.pop("added_tokens")[: len(old["added_tokens"])] == old.pop("added_tokens")
    assert new == old
    tokenizer = AutoProcessor.from_pretrained(expanded_dir).tokenizer
    assert CoordVocab.from_tokenizer(tokenizer).ids == tuple(range(NUM_OLD, NUM_OLD + 1000))
    config, old_config = (
        json.loads((d / "tokenizer_config.json").read_text("utf-8")) for d in (expanded_dir, plain_dir)
    )
    assert config | {"processor_class": None} == old_config | {"processor_class": None}
    for name in ("chat_template.jinja", "processor_config.json", "generation_config.json"):
        assert (expanded_dir / name).read_text("utf-8") == (plain_dir / name).read_text("utf-8"), name


def test_logits_over_the_old_vocabulary_do_not_change(plain_dir, expanded_dir):
    before = logits_of(load(plain_dir), inputs_of(plain_dir, TEXT))
    after = logits_of(load(expanded_dir), inputs_of(expanded_dir, TEXT))
    assert torch.equal(after[..., :NUM_OLD], before[..., :NUM_OLD])


@pytest.mark.slow
def test_saved_reloaded_and_merged_models_have_equal_logits_in_a_fresh_process(expanded_dir, tied, tmp_path):
    """A checkpoint as it is, after another save, and with offsets and LoRA merged into it."""
    model, inputs = load(expanded_dir), inputs_of(expanded_dir, TEXT + COORDS)
    assert (
        inputs["input_ids"] >= OLD_ROWS
    ).sum() == 2  # coordinates 267 and 999 stand in rows that were added
    expected = {"added": logits_of(model, inputs)}
    model.save_pretrained(tmp_path / "again")
    expected["again"] = expected["added"]
    ids = CoordVocab.from_tokenizer(AutoProcessor.from_pretrained(expanded_dir).tokenizer).ids
    offset = attach_coord_offset(model, ids, tie_head=tied)
    for table_KH in offset.tables.values():
        table_KH.data.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    adapted = with_lora(model, target_modules=["q_proj", "o_proj"]).eval()
    adapted.peft_config["default"].base_model_name_or_path = str(expanded_dir)
    adapted.save_pretrained(tmp_path / "checkpoint")
    save_coord_offset(adapted, tmp_path / "checkpoint")
    expected["merged"] = logits_of(adapted, inputs)
    assert not torch.allclose(expected["merged"], expected["added"], atol=1e-3)
    merge_offset(tmp_path / "checkpoint", tmp_path / "merged")

    save_file(inputs, tmp_path / "inputs")
    folders = {"added": expanded_dir, "again": tmp_path / "again", "merged": tmp_path / "merged"}
    files = [str(path) for name, folder in folders.items() for path in (folder, tmp_path / f"{name}.logits")]
    command = [sys.executable, "-c", FRESH, str(tmp_path / "inputs"), *files]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    for name, logits in expected.items():
        found = load_file(tmp_path / f"{name}.logits")
        assert bool(found["tied"]) is tied, name
        torch.testing.assert_close(found["logits"], logits, rtol=1e-5, atol=1e-5, msg=name)
