"""`custom.augmentation` in a run file: what is refused, and with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordexp.config import load_run_config
from coordexp.config.schema.augmentation import OPERATIONS, Augmentation
from coordexp.errors import ConfigError

START = "model: {model: m}\ncustom:\n  augmentation:\n    enabled: true\n"
FLIP = "    ops: [{name: hflip, params: {prob: 0.5}}]\n"
REFUSED = {
    START: "custom.augmentation in run.yaml:3: enabled: true, but ops is empty; list operations, or set enabled: "
    "false.",
    START + "    ops: [{name: rotate}]\n": "custom.augmentation.ops[0].name = \"rotate\" in run.yaml:5: "
    f"expected one of {', '.join(OPERATIONS)}.",
    START + "    ops: [{name: hflip, params: {probability: 1}}]\n": "custom.augmentation.ops[0].params.probability in "
    "run.yaml:5: unknown key. Known here: prob.",
    START + "    ops: [{name: random_crop, params: {scale: [0.9, 0.5]}}]\n": "custom.augmentation.ops[0].params in "
    "run.yaml:5: scale is [0.9, 0.5], expected [least, most].",
    START + FLIP + "    curriculum: {phases: [{until_percent: 50}]}\n": "custom.augmentation.curriculum in run.yaml:6: "
    "phases end at 50 percent; expected ascending ends, the last one 100.",
    START + FLIP + "    curriculum: {phases: [{until_percent: 100, ops: {vflip: {prob: 1}}}]}\n": "custom.augmentation "
    "in run.yaml:3: a phase until 100 percent changes vflip, which is not in ops; listed there: hflip.",
    START + FLIP + "    curriculum: {phases: [{until_percent: 100, ops: {hflip: {prob: 2}}}]}\n": "custom.augmentation "
    "in run.yaml:3: hflip in a phase: prob: Input should be less than or equal to 1.",
    START + "    ops: [{name: resize_by_scale}]\ntraining: {packing: true}\n": "custom.augmentation.ops in run.yaml:5: "
    "resize_by_scale with hi above 1 makes samples longer than they were when they were packed or grouped by length; "
    "set hi to 1, or train without that.",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"), REFUSED.items(), ids=[str(index) for index in range(len(REFUSED))]
)
def test_what_is_refused(tmp_path: Path, text: str, expected: str):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_run_config(file)
    assert str(caught.value).replace(f"{tmp_path}/", "") == expected


def test_it_is_off_by_default_and_pictures_that_shrink_may_be_packed(tmp_path: Path):
    assert not Augmentation().enabled
    file = tmp_path / "run.yaml"
    shrunk = "    ops: [{name: resize_by_scale, params: {lo: 0.5, hi: 1}}, {name: random_crop}]\n"
    file.write_text(START + shrunk + "training: {packing: true}\n")
    assert load_run_config(file).sections.custom.augmentation.largest_scale == 1


def test_the_largest_scale_is_that_of_any_phase():
    settings = Augmentation.model_validate({
        "enabled": True,
        "ops": [{"name": "resize_by_scale", "params": {"lo": 1, "hi": 1.5}}, {"name": "resize_by_scale"}],
        "curriculum": {"phases": [
            {"until_percent": 50, "ops": {"resize_by_scale": {"hi": 2.0}}},
            {"until_percent": 100, "ops": {"resize_by_scale": {"prob": 0.0}}},
        ]},
    })  # fmt: skip
    assert settings.largest_scale == 4.0  # both of them, in the first phase
