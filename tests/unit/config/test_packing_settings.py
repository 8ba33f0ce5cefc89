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
    "flat form coordexp: {training: {packing: true}} and lazy_tokenize: false)."
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
    "training: {packing: true}\ndata:\n  lazy_tokenize: true\n": "training.packing in run.yaml:1: makes lazy_tokenize "
    "False, but data.lazy_tokenize is True (run.yaml:3); keep one of them.",
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
        tmp_path, f"model: m\nattn_impl: {attn_impl}\npacking: true\npacking_length: 512\n"
    ).to_swift_flat()
    assert (flat["packing"], flat["packing_length"]) == (True, 512)
    assert "coordexp" not in flat


def test_our_packing_reaches_the_trainer_and_makes_ms_swift_measure_the_samples(tmp_path: Path) -> None:
    text = "training: {packing: true, effective_batch_size: 4, per_device_train_batch_size: 2}\nmodel: {model: m}\n"
    config = load(tmp_path, text, "--set", "training.eval_packing=true", "--packing_length", "700")
    flat = config.to_swift_flat()
    assert flat["coordexp"] == {"training": {"packing": True, "eval_packing": True}}
    assert (flat["lazy_tokenize"], flat["packing_length"], flat["gradient_accumulation_steps"]) == (
        False,
        700,
        2,
    )
    assert "packing" not in flat
    assert config.sources["lazy_tokenize"].endswith("run.yaml:1 (training.packing)")
    assert parse_sections(flat["coordexp"]).training.eval_packing


def test_the_flat_form_says_the_same(tmp_path: Path) -> None:
    flat = "model: m\nlazy_tokenize: false\ncoordexp: {training: {packing: true}}\n"
    sections = "model: {model: m}\ntraining: {packing: true}\n"
    assert load(tmp_path, flat).config_hash == load(tmp_path, sections).config_hash
    assert load(tmp_path, flat).config_hash != load(tmp_path, "model: m\nlazy_tokenize: false\n").config_hash


def test_the_flat_form_must_have_samples_measured(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="makes lazy_tokenize False, but lazy_tokenize is True"):
        load(tmp_path, "model: m\nlazy_tokenize: true\ncoordexp: {training: {packing: true}}\n")


def test_effective_batch_size_is_no_part_of_the_identity(tmp_path: Path) -> None:
    derived = load(
        tmp_path, "training: {effective_batch_size: 4, per_device_train_batch_size: 2}\nmodel: {model: m}\n"
    )
    written = load(tmp_path, "model: m\nper_device_train_batch_size: 2\ngradient_accumulation_steps: 2\n")
    assert derived.config_hash == written.config_hash
