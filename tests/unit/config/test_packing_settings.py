"""Packing settings that cannot take effect are refused with one sentence; the others reach ms-swift or the trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordexp.config import load_run_config, parse_sections
from coordexp.config.run.packing import FLASH_ATTENTION
from coordexp.errors import ConfigError

FLASH_ONLY = (
    "ms-swift allows it under flash attention only (attn_impl: flash_attn or flash_attention_2 or flash_attention_3 "
    "or flash_attention_4). Under sdpa or eager attention let coordexp pack: training.packing: true (in ms-swift's "
    "flat form coordexp: {training: {packing: true}})."
)
BETWEEN = "stage 1 packs its data once, before training, and no pack waits for samples; remove it."

REFUSED = {
    "model: m\npacking: true\n": f"packing = true in run.yaml:2: {FLASH_ONLY}",
    "model: m\nattn_impl: eager\npadding_free: true\n": f"padding_free = true in run.yaml:3: {FLASH_ONLY}",
    "model: {attn_impl: sdpa}\ndata: {packing: true}\n": f"data.packing = true in run.yaml:2: {FLASH_ONLY}",
    "training:\n  packing: true\n  packing_buffer: 5\n": f"training.packing_buffer = 5 in run.yaml:3: {BETWEEN}",
    "training:\n  packing_min_fill_ratio: 0.5\n": f"training.packing_min_fill_ratio = 0.5 in run.yaml:2: {BETWEEN}",
    "training:\n  packing_drop_last: true\n": f"training.packing_drop_last = true in run.yaml:2: {BETWEEN}",
    "training:\n  eval_packing: true\n": "training.eval_packing = true in run.yaml:2: has no effect without "
    "packing: true.",
    "data:\n  packing_length: 512\n": "data.packing_length = 512 in run.yaml:2: has no effect without packing: true.",
    "model: m\nlazy_tokenize: false\n": "lazy_tokenize = false in run.yaml:2: ms-swift encodes every sample before "
    "training, and leaves out in silence what it cannot encode; lengths are told without that. Remove it, or write "
    "strict: true.",
    "model: m\ngroup_by_length: true\n": "group_by_length = true in run.yaml:2: ms-swift encodes every sample for it "
    "before training, and leaves out in silence what it cannot encode. Write lazy_tokenize: true beside it: lengths "
    "are told without that. Or write strict: true.",
    "model: m\nattn_impl: flash_attn\npacking: true\nstrict: false\n": "packing = true in run.yaml:3: ms-swift encodes "
    "every sample before it packs them, and leaves out in silence what it cannot encode. Write training.packing: true "
    "instead (in ms-swift's flat form coordexp: {training: {packing: true}}), or strict: true.",
}


def load(folder: Path, text: str, *overrides: str):
    file = folder / "run.yaml"
    file.write_text(text)
    return load_run_config(file, overrides)


@pytest.mark.parametrize(("text", "expected"), REFUSED.items(), ids=list(REFUSED))
def test_what_cannot_take_effect_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert str(caught.value).replace(f"{tmp_path}/", "") == expected


@pytest.mark.parametrize("attn_impl", FLASH_ATTENTION)
def test_packing_of_ms_swift_stays_an_argument_of_ms_swift(tmp_path: Path, attn_impl: str) -> None:
    flat = load(
        tmp_path, f"model: m\nattn_impl: {attn_impl}\nstrict: true\npacking: true\npacking_length: 512\n"
    ).to_swift_flat()
    assert (flat["packing"], flat["packing_length"]) == (True, 512)
    assert "coordexp" not in flat


def test_our_packing_reaches_the_trainer_and_needs_no_sample_encoded_beforehand(tmp_path: Path) -> None:
    text = "training: {packing: true, effective_batch_size: 4, per_device_train_batch_size: 2}\nmodel: {model: m}\n"
    config = load(tmp_path, text, "--set", "training.eval_packing=true", "--packing_length", "700")
    flat = config.to_swift_flat()
    assert flat["coordexp"] == {"training": {"packing": True, "eval_packing": True}}
    assert (flat["packing_length"], flat["gradient_accumulation_steps"]) == (700, 2)
    assert not {"packing", "lazy_tokenize"} & flat.keys()
    assert parse_sections(flat["coordexp"]).training.eval_packing


def test_the_flat_form_says_the_same(tmp_path: Path) -> None:
    flat = "model: m\ncoordexp: {training: {packing: true}}\n"
    sections = "model: {model: m}\ntraining: {packing: true}\n"
    assert load(tmp_path, flat).config_hash == load(tmp_path, sections).config_hash
    assert load(tmp_path, flat).config_hash != load(tmp_path, "model: m\n").config_hash


@pytest.mark.parametrize(
    "beside", ["lazy_tokenize: false\nstrict: true", "group_by_length: true\nlazy_tokenize: true"]
)
def test_lengths_are_known_where_nothing_is_left_out(tmp_path: Path, beside: str) -> None:
    load(tmp_path, f"model: m\n{beside}\ncoordexp: {{training: {{packing: true}}}}\n")


def test_effective_batch_size_is_no_part_of_the_identity(tmp_path: Path) -> None:
    derived = load(
        tmp_path, "training: {effective_batch_size: 4, per_device_train_batch_size: 2}\nmodel: {model: m}\n"
    )
    written = load(tmp_path, "model: m\nper_device_train_batch_size: 2\ngradient_accumulation_steps: 2\n")
    assert derived.config_hash == written.config_hash
