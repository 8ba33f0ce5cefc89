"""What a valid run is told: coordinate rows that nothing trains, and weights without a float32 copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordexp.config.run.advice import TRAINED_MARK, advice

FULL = {"tuner_type": "full", "torch_dtype": "bfloat16", "learning_rate": 1e-5}


def test_plain_lora_leaves_the_coordinate_rows_alone(tmp_path: Path):
    for swift in ({}, {"tuner_type": "lora", "target_modules": ["all-linear"], "model": str(tmp_path)}):
        (sentence,) = advice(swift, coord_offset=False)
        assert "rows of the 1000 coordinate tokens" in sentence
    assert advice({"tuner_type": "lora"}, coord_offset=True) == []
    assert advice({"tuner_type": "full"}, coord_offset=False) == []
    assert advice({"modules_to_save": ["embed_tokens", "lm_head"]}, coord_offset=False) == []
    (tmp_path / TRAINED_MARK).write_text("{}")
    assert advice({"tuner_type": "lora", "model": str(tmp_path)}, coord_offset=False) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_without_a_master_copy_is_told(dtype: str):
    (sentence,) = advice({**FULL, "torch_dtype": dtype}, coord_offset=False)
    assert dtype in sentence
    assert advice({**FULL, "deepspeed": "zero2"}, coord_offset=False) == []
    assert advice({**FULL, "torch_dtype": "float32"}, coord_offset=False) == []


def test_muon_after_adam_is_told():
    run = {"tuner_type": "full", "optimizer": "coord_muon"}
    (sentence,) = advice(run, coord_offset=False)
    assert (
        "optimizer: coord_muon with tuner_type: full trains on with Muon what was trained with AdamW"
        in sentence
    )
    assert advice({**run, "optimizer": "coord_adamw"}, coord_offset=False) == []
    assert advice({**run, "tuner_type": "lora"}, coord_offset=True) == []
