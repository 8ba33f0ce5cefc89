"""Pictures that a run cannot use are named with file and line before it starts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coordexp.codec.records import read_jsonl
from coordexp.config.schema.prompt import Prompt
from coordexp.data.dataset import read_training_rows
from coordexp.data.lengths import check_lengths
from coordexp.errors import RecordError
from coordexp.image_size import PixelLimits
from coordexp.inference.picture_room import PictureRoom
from coordexp.swift_bridge.checkpoint import load_template

LIMITS = PixelLimits(65_536, 16_777_216, 32)


def write(folder, *pictures, name="train.jsonl"):
    """A data file with a line for each (file name, width, height)."""
    lines = []
    for file, width, height in pictures:
        if not (folder / file).exists():
            Image.new("RGB", (width, height), "teal").save(folder / file)
        objects = [{"desc": "cat", "bbox_2d": [1, 2, 30, 40]}]
        lines.append(json.dumps({"images": [file], "width": width, "height": height, "objects": objects}))
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def noise(path, width=640, height=480):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_a_strip_is_named(tmp_path):
    data = write(tmp_path, ("a.png", 64, 64), ("strip.png", 2100, 10))
    with pytest.raises(
        RecordError, match=r"train\.jsonl:2: image .*strip\.png is 2100 x 10 pixels, an aspect ratio of 210"
    ):
        read_training_rows(data, prompt=Prompt())


@pytest.mark.parametrize("kind", ["jpg", "png"])
@pytest.mark.parametrize("share", [0.5, 0.98])
def test_a_file_that_is_cut_off_is_named(tmp_path, kind, share):
    noise(tmp_path / f"cut.{kind}")
    whole = (tmp_path / f"cut.{kind}").read_bytes()
    (tmp_path / f"cut.{kind}").write_bytes(whole[: int(share * len(whole))])
    data = write(tmp_path, ("a.png", 64, 64), (f"cut.{kind}", 640, 480))
    with pytest.raises(RecordError, match=rf"train\.jsonl:2: .*cut\.{kind}"):
        read_training_rows(data, prompt=Prompt())


def test_a_file_with_something_behind_its_end_is_taken(tmp_path):
    noise(tmp_path / "long.jpg")
    (tmp_path / "long.jpg").write_bytes((tmp_path / "long.jpg").read_bytes() + bytes(10_000))
    data = write(tmp_path, ("long.jpg", 640, 480))
    assert len(read_training_rows(data, prompt=Prompt())) == 1


@pytest.fixture(scope="module")
def template(real_model: Path):
    template = load_template(real_model)
    template.set_mode("train")
    return template


def test_samples_longer_than_the_sequence_are_named_with_the_cap_that_would_do(tmp_path, template):
    """The picture of 4000 x 3000 pixels has 11,750 visual tokens."""
    data = write(tmp_path, ("a.png", 640, 480), ("b.jpg", 4000, 3000), ("c.jpg", 3000, 3000))
    rows = read_training_rows(data, prompt=Prompt())
    template.max_length = 4096
    with pytest.raises(
        RecordError, match=r"2 of 3 samples are longer than 4096 tokens: .*train\.jsonl:2 has 117"
    ) as error:
        check_lengths(rows, template)
    assert "a picture of 4000 x 3000" in str(error.value)
    cap = int(str(error.value).partition("With max_pixels of ")[2].partition(" ")[0])
    assert cap % 1024 == 0
    try:
        template.limit_pixels(max_pixels=cap)
        check_lengths(rows, template)
        template.limit_pixels(max_pixels=int(1.1 * cap))
        with pytest.raises(RecordError, match="longer than 4096"):
            check_lengths(rows, template)
    finally:
        template.limit_pixels(max_pixels=16_777_216)


def test_where_no_cap_would_do_none_is_named(tmp_path, template):
    rows = read_training_rows(write(tmp_path, ("a.png", 640, 480)), prompt=Prompt())
    template.max_length = 80
    with pytest.raises(RecordError, match=r"fewer objects or smaller pictures\.$"):
        check_lengths(rows, template)


def test_inference_names_a_picture_larger_than_the_model_takes(tmp_path):
    data = write(tmp_path, ("a.png", 640, 480), ("b.jpg", 4000, 3000))
    first, second = read_jsonl(data, require_images=True)
    room = PictureRoom(LIMITS, 4064, "the model's length of 8192 tokens")
    room.check(first)
    with pytest.raises(RecordError) as error:
        room.check(second)
    assert str(error.value) == (
        f"{data}:2: b.jpg of 4000 x 3000 pixels: 11750 visual tokens, but the model's length of 8192 tokens leaves "
        "room for 4064; --max-pixels 4161536 or less makes it fit"
    )
    PictureRoom(LIMITS.within(max_pixels=4_161_536), 4064, "").check(second)
    with pytest.raises(RecordError, match="no --max-pixels that the processor takes makes it fit"):
        PictureRoom(LIMITS, 60, "the model's length of 100 tokens").check(first)


def test_all_pictures_of_a_record_count(tmp_path):
    noise(tmp_path / "a.png")
    noise(tmp_path / "b.png", 320, 640)
    record = {"images": ["a.png", "b.png"], "width": 640, "height": 480, "objects": []}
    (tmp_path / "two.jsonl").write_text(json.dumps(record) + "\n")
    [two] = read_jsonl(tmp_path / "two.jsonl", require_images=True)
    PictureRoom(LIMITS, 500, "x").check(two)
    with pytest.raises(
        RecordError, match=r"two\.jsonl:1: a\.png .*, b\.png of 320 x 640 pixels: 500 visual tokens"
    ):
        PictureRoom(LIMITS, 499, "x").check(two)
