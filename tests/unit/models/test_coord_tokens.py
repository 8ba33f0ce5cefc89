"""Coordinate-vocabulary expansion of a checkpoint on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.errors import ConfigError
from coordexp.models.coord_tokens import add_coord_tokens
from coordexp.models.tiny import build_tiny_model


@pytest.fixture(scope="module")
def plain_dir(tmp_path_factory) -> Path:
    """A nano model whose tokenizer holds no coordinate token; 576 rows, some of them padding."""
    output_dir = tmp_path_factory.mktemp("plain") / "nano"
    build_tiny_model(output_dir, preset="nano", coord_tokens=False)
    return output_dir


@pytest.fixture(scope="module")
def expanded_dir(plain_dir, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("expanded") / "nano"
    assert add_coord_tokens(plain_dir, output_dir) == (1000, True)
    return output_dir


def _load(model_dir: Path):
    return AutoModelForImageTextToText.from_pretrained(model_dir), AutoProcessor.from_pretrained(model_dir)


def _logits(model, processor) -> torch.Tensor:
    prompt = "<|vision_start|><|image_pad|><|vision_end|>Detect all objects."
    batch = processor(text=[prompt], images=[Image.new("RGB", (64, 64), "red")], return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits


def test_logits_over_the_old_vocabulary_do_not_change(plain_dir, expanded_dir):
    plain, old = _load(plain_dir)
    before, after = _logits(plain, old), _logits(*_load(expanded_dir))
    num_old = len(old.tokenizer)
    assert before.shape[-1] == 576
    assert after.shape[-1] == 1536  # padded to a multiple of 64
    torch.testing.assert_close(after[..., :num_old], before[..., :num_old], atol=0, rtol=0)


def test_tokenizer_gains_the_vocabulary_and_keeps_its_old_ids(plain_dir, expanded_dir):
    (_, old), (model, new) = _load(plain_dir), _load(expanded_dir)
    vocab = CoordVocab.from_tokenizer(new.tokenizer)
    assert vocab.ids == tuple(range(len(old.tokenizer), len(old.tokenizer) + 1000))
    assert max(vocab.ids) < model.config.text_config.vocab_size == model.get_input_embeddings().num_embeddings
    text = '{"desc": "caf\u00e9", "bbox_2d": ['
    assert new.tokenizer.encode(text) == old.tokenizer.encode(text)
    assert new.tokenizer.decode(vocab.ids[:2], skip_special_tokens=True) == "<|coord_0|><|coord_1|>"


def test_new_rows_lie_around_the_mean_of_the_old_and_all_differ(plain_dir, expanded_dir):
    (plain, old), (expanded, new) = _load(plain_dir), _load(expanded_dir)
    num_old = len(old.tokenizer)
    old_rows = plain.get_input_embeddings().weight[:num_old]
    rows = expanded.get_input_embeddings().weight[list(CoordVocab.from_tokenizer(new.tokenizer).ids)]
    assert len(rows.unique(dim=0)) == 1000
    # 1000 draws: mean of the noise within 5 standard errors of 0, its std within 20 % of 0.1 * std(old)
    expected_std = 0.1 * old_rows.std(dim=0)
    assert ((rows.mean(dim=0) - old_rows.mean(dim=0)).abs() < 5 * expected_std / 1000**0.5).all()
    torch.testing.assert_close(rows.std(dim=0), expected_std, rtol=0.2, atol=0)


def test_tied_embeddings_stay_tied(expanded_dir):
    model, _ = _load(expanded_dir)
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_untied_head_is_expanded_from_its_own_rows(tmp_path):
    build_tiny_model(tmp_path / "tied", preset="nano", coord_tokens=False)
    model, processor = _load(tmp_path / "tied")
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 3.0)
    model.save_pretrained(tmp_path / "untied")
    processor.save_pretrained(tmp_path / "untied")
    add_coord_tokens(tmp_path / "untied", tmp_path / "expanded")
    expanded, new = _load(tmp_path / "expanded")
    assert expanded.lm_head.weight is not expanded.get_input_embeddings().weight
    num_old = len(processor.tokenizer)
    torch.testing.assert_close(
        expanded.lm_head.weight[:num_old], model.lm_head.weight[:num_old], atol=0, rtol=0
    )
    new_ids = list(CoordVocab.from_tokenizer(new.tokenizer).ids)
    assert abs(expanded.lm_head.weight[new_ids].mean().item() - 3.0) < 0.05
    assert abs(expanded.get_input_embeddings().weight[new_ids].mean().item()) < 0.05


def test_a_matrix_padded_beyond_the_tokenizer_never_shrinks(plain_dir, tmp_path):
    model, processor = _load(plain_dir)
    model.resize_token_embeddings(2048)
    model.save_pretrained(tmp_path / "padded")
    processor.save_pretrained(tmp_path / "padded")
    add_coord_tokens(tmp_path / "padded", tmp_path / "expanded")
    padded, _ = _load(tmp_path / "padded")
    expanded, new = _load(tmp_path / "expanded")
    new_ids = set(CoordVocab.from_tokenizer(new.tokenizer).ids)
    untouched = [row for row in range(2048) if row not in new_ids]
    before, after = padded.get_input_embeddings().weight, expanded.get_input_embeddings().weight
    assert after.shape[0] == 2048
    torch.testing.assert_close(after[untouched], before[untouched], atol=0, rtol=0)
    assert not torch.equal(after[sorted(new_ids)], before[sorted(new_ids)])


def test_only_missing_tokens_are_added_and_present_rows_kept(plain_dir, tmp_path):
    model, processor = _load(plain_dir)
    present_id = len(processor.tokenizer)
    processor.tokenizer.add_tokens(["<|coord_999|>"])
    model.save_pretrained(tmp_path / "partial")
    processor.save_pretrained(tmp_path / "partial")
    assert add_coord_tokens(tmp_path / "partial", tmp_path / "expanded") == (999, True)
    expanded, new = _load(tmp_path / "expanded")
    assert CoordVocab.from_tokenizer(new.tokenizer).ids[999] == present_id
    row = model.get_input_embeddings().weight[present_id]
    torch.testing.assert_close(expanded.get_input_embeddings().weight[present_id], row, atol=0, rtol=0)


def test_weights_keep_their_dtype(plain_dir, tmp_path):
    model, processor = _load(plain_dir)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    processor.save_pretrained(tmp_path / "bf16")
    add_coord_tokens(tmp_path / "bf16", tmp_path / "expanded")
    expanded = AutoModelForImageTextToText.from_pretrained(tmp_path / "expanded", dtype="auto")
    assert expanded.get_input_embeddings().weight.dtype == torch.bfloat16


def test_same_seed_same_weights_other_seed_other_rows(plain_dir, expanded_dir, tmp_path):
    add_coord_tokens(plain_dir, tmp_path / "same")
    add_coord_tokens(plain_dir, tmp_path / "other", seed=1)
    reference = (expanded_dir / "model.safetensors").read_bytes()
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == reference
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != reference


def test_rerun_is_up_to_date_and_an_expanded_model_needs_nothing(plain_dir, expanded_dir, tmp_path):
    assert add_coord_tokens(plain_dir, expanded_dir) == (1000, False)
    assert add_coord_tokens(expanded_dir, tmp_path / "twice") == (0, False)
    assert not (tmp_path / "twice").exists()
    with pytest.raises(ConfigError, match="seed: 0 there, 5 asked for"):
        add_coord_tokens(plain_dir, expanded_dir, seed=5)


def test_a_directory_without_config_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no-such-model: no config\.json"):
        add_coord_tokens(tmp_path / "no-such-model", tmp_path / "out")


def test_a_failed_expansion_leaves_nothing_behind(plain_dir, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for source in plain_dir.iterdir():
        if source.name != "model.safetensors":
            (broken / source.name).write_bytes(source.read_bytes())
    with pytest.raises(OSError, match=r"model\.safetensors"):
        add_coord_tokens(broken, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_processor_of_the_result_keeps_image_settings(plain_dir, expanded_dir):
    before, after = (
        json.loads((d / "processor_config.json").read_text())["image_processor"]
        for d in (plain_dir, expanded_dir)
    )
    assert after == before
