"""The size rule of Qwen-VL against the two libraries that have it, and the limits in a model folder."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from qwen_vl_utils.vision_process import smart_resize as by_qwen_vl_utils
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as by_transformers

from coordexp.errors import ConfigError, RecordError
from coordexp.image_size import PixelLimits

QWEN3_VL = PixelLimits(65_536, 16_777_216, 32)
sides = st.integers(1, 6000)


@pytest.mark.parametrize(
    ("limits", "size", "fitted", "tokens"),
    [
        (QWEN3_VL, (640, 480), (640, 480), 300),  # multiples of 32 within the limits stay
        (QWEN3_VL, (64, 64), (256, 256), 64),  # smaller ones grow
        (QWEN3_VL, (650, 470), (640, 480), 300),  # to the nearest multiples
        (QWEN3_VL, (4000, 3000), (4000, 3008), 11_750),  # a photograph of 12 million pixels
        (QWEN3_VL.within(max_pixels=501_760), (4000, 3000), (800, 608), 475),
        (QWEN3_VL.within(max_pixels=501_760), (640, 480), (640, 480), 300),
    ],
)
def test_known_sizes(limits, size, fitted, tokens):
    assert limits.fitted(*size) == fitted
    assert limits.num_tokens(*size) == tokens
    assert limits.fit(Image.new("RGB", size)).size == fitted


@settings(max_examples=300, deadline=None)
@given(width=sides, height=sides, most=st.integers(4 * 65_536, 4_000_000))
def test_sizes_are_those_of_both_libraries_and_final(width, height, most):
    """Where the libraries' own result is final: of very narrow pictures it is not, and theirs differ."""
    assume(max(width, height) <= 200 * min(width, height))
    limits = PixelLimits(65_536, most, 32)
    found = limits.fitted(width, height)
    assert limits.fitted(*found) == found  # who scales again changes nothing
    assert found[0] % 32 == found[1] % 32 == 0
    once = by_transformers(height, width, 32, 65_536, most)
    if by_transformers(*once, 32, 65_536, most) == once:
        assert found == once[::-1]
        if min(width, height) > 16:  # half a token rounds to none, which qwen-vl-utils makes one at once
            assert found == by_qwen_vl_utils(height, width, 32, 65_536, most)[::-1]
    assert found[0] * found[1] <= most or min(found) == 32


@settings(max_examples=300, deadline=None)
@given(width=sides, height=sides, most=st.integers(66_000, 4 * 65_536))
def test_sizes_are_final_between_limits_that_lie_close_together(width, height, most):
    """The libraries' rule scales some pictures up and down by turns there; here scaling again changes nothing."""
    assume(max(width, height) <= 20 * min(width, height))
    limits = PixelLimits(65_536, most, 32)
    found = limits.fitted(width, height)
    assert by_transformers(*found[::-1], 32, 65_536, most) == found[::-1]
    assert 65_536 <= found[0] * found[1] <= most


def test_a_picture_that_the_rule_never_settles_gets_the_size_of_most_like_shape():
    limits = PixelLimits(65_536, 80_000, 32)
    once = by_transformers(251, 321, 32, 65_536, 80_000)
    assert (once, by_transformers(*once, 32, 65_536, 80_000)) == (
        (224, 288),
        (256, 320),
    )  # too small, too large
    assert limits.fitted(321, 251) == limits.fitted(30, 23) == (320, 224)


def test_scaling_keeps_what_is_where():
    """A mark in a picture lies at the same part of it afterwards."""
    pixels = np.zeros((300, 900, 3), dtype=np.uint8)
    pixels[100:200, 600:750] = 255
    fitted = np.asarray(PixelLimits(65_536, 80_000, 32).fit(Image.fromarray(pixels)))
    height, width, _ = fitted.shape
    assert (height, width) == (160, 480)
    ys, xs = np.nonzero(fitted[..., 0] > 127)
    assert (xs.min() / width, (xs.max() + 1) / width) == pytest.approx((600 / 900, 750 / 900), abs=1 / width)
    assert (ys.min() / height, (ys.max() + 1) / height) == pytest.approx((1 / 3, 2 / 3), abs=1 / height)


def test_a_picture_in_its_size_is_left_alone():
    picture = Image.new("RGB", (640, 480))
    assert QWEN3_VL.fit(picture) is picture


def test_a_strip_is_refused():
    with pytest.raises(RecordError, match=r"2010 x 10 pixels: one side is more than 200 times the other"):
        QWEN3_VL.fitted(2010, 10)
    assert QWEN3_VL.fitted(2000, 10)[1] == 32


@pytest.mark.parametrize(("least", "most"), [(0, 5000), (9000, 5000), (10, 1000)])
def test_limits_that_contradict_each_other_are_refused(least, most):
    with pytest.raises(ConfigError, match=f"min_pixels is {least} and max_pixels {most}"):
        PixelLimits(least, most, 32)


FILES = {
    "size": {"size": {"shortest_edge": 65_536, "longest_edge": 501_760}, "patch_size": 16, "merge_size": 2},
    "old names": {"min_pixels": 65_536, "max_pixels": 501_760, "patch_size": 16, "merge_size": 2},
}


@pytest.mark.parametrize("name", ["processor_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("form", FILES)
def test_limits_are_read_from_a_model_folder(tmp_path, name, form):
    settings = FILES[form] if name.startswith("pre") else {"image_processor": FILES[form]}
    (tmp_path / name).write_text(json.dumps(settings))
    assert PixelLimits.of_folder(tmp_path) == PixelLimits(65_536, 501_760, 32)


def test_a_folder_without_limits_is_named(tmp_path, real_model):
    assert PixelLimits.of_folder(real_model) == QWEN3_VL
    with pytest.raises(ConfigError, match=r"neither processor_config\.json nor preprocessor_config\.json"):
        PixelLimits.of_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"height": 224}}')
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json: expected size\.shortest_edge"):
        PixelLimits.of_folder(tmp_path)
