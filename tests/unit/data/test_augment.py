"""Augmented samples: boxes agree with the pixels, mirrored bins are exact, draws depend on the turn alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from coordexp.codec.records import Record
from coordexp.codec.schema import BoxObject
from coordexp.config.schema.augmentation import Augmentation
from coordexp.data.augment.augmenter import Augmented, Augmenter
from coordexp.data.augment.draws import Draws
from coordexp.data.augment.geometric import mirrored, scaled, window_of
from coordexp.data.augment.scene import record_of_scene, scene_of
from coordexp.errors import RecordError
from coordexp.geometry import quantize_boxes


def make(ops: list[dict[str, Any]], seed: int = 0, **rest: Any) -> Augmenter:
    return Augmenter(Augmentation.model_validate({"enabled": True, "ops": ops, **rest}), seed)


def write_scene(folder: Path, boxes: list[tuple[int, int, int, int]], size: tuple[int, int]) -> Record:
    """Up to three black rectangles on white, given by first and last pixel, each in a colour channel of its own."""
    channels = []
    for index in range(3):
        channels.append(Image.new("L", size, 255))
        if index < len(boxes):
            ImageDraw.Draw(channels[-1]).rectangle(boxes[index], fill=0)
    Image.merge("RGB", channels).save(folder / "scene.png", compress_level=0)
    objects = tuple(
        BoxObject(str(index), "bbox_2d", tuple(quantize_boxes(box, *size).tolist()))
        for index, box in enumerate(boxes)
    )
    return Record(("scene.png",), *size, objects, file=str(folder / "d.jsonl"), line=7)


def boxes_in_pixels(augmented: Augmented) -> dict[str, np.ndarray]:
    """Bins of the tight box around what is rather black than white in a channel, for all objects that are seen."""
    found = {}
    for index in range(3):
        rows, columns = np.nonzero(np.asarray(augmented.picture)[..., index] < 128)
        if len(rows):
            box = (columns.min(), rows.min(), columns.max(), rows.max())
            found[str(index)] = quantize_boxes(box, *augmented.picture.size)
    return found


operations = st.lists(
    st.one_of(
        st.sampled_from([{"name": "hflip"}, {"name": "vflip"}]),
        st.builds(
            lambda lo, span, align: {
                "name": "resize_by_scale", "params": {"lo": lo, "hi": lo + span, "align_multiple": align}
            },
            st.floats(0.75, 1.2), st.floats(0, 0.2), st.sampled_from([None, 32]),
        ),
        st.builds(
            lambda low, keep: {
                "name": "random_crop",
                "params": {"scale": [low, 1.0], "aspect_ratio": [0.8, 1.25], "keep_size": keep, "min_objects": 0},
            },
            st.floats(0.5, 0.9), st.booleans(),
        ),
    ),
    min_size=1, max_size=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scenes")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ops=operations, size=st.tuples(st.integers(1000, 1500), st.integers(1000, 1500)), seed=st.integers(0, 99)
)
def test_boxes_agree_with_the_pixels_to_one_bin(
    folder: Path, ops: list[dict[str, Any]], size: tuple[int, int], seed
):
    """To one pixel where windows and scaling have made pixels larger than bins."""
    draws = Draws("scene", seed)
    boxes = []
    for _ in range(3):
        x, y = draws.below(size[0] - 40), draws.below(size[1] - 40)
        boxes.append((x, y, x + 20 + draws.below(size[0] - x - 20), y + 20 + draws.below(size[1] - y - 20)))
    record = write_scene(folder, boxes, size)
    augmented = make(ops, seed, min_visible=0.25)(record, turn=str(seed))
    assert (augmented.record.width, augmented.record.height) == augmented.picture.size
    shown = boxes_in_pixels(augmented)
    for obj in augmented.record.objects:
        difference = np.abs(np.array(obj.bins) - shown.pop(obj.desc))
        pixel = np.ceil(999 / (np.array(augmented.picture.size * 2) - 1))
        assert (difference <= pixel).all(), (obj, difference)
    # What was left out is a rest of less than a quarter, cut at a border of the picture.
    for desc, bins in shown.items():
        assert bins.min() <= 1 or bins.max() >= 998, (desc, bins)


@given(st.lists(st.integers(0, 999), min_size=8, max_size=8), st.integers(2, 3000), st.integers(2, 3000))
def test_mirrored_bins_are_999_minus_the_bin(bins: list[int], width: int, height: int):
    x1, x2, y1, y2, *rest = (*sorted(bins[:2]), *sorted(bins[2:4]), *bins[4:])
    box = BoxObject("a", "bbox_2d", (x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)))
    outline = BoxObject("b", "poly", (*rest, x1, y1))
    record = Record(("a.png",), width, height, (box, outline))
    picture = Image.new("RGB", (1, 1))
    if max(box.bins) > 999:
        return
    scene = scene_of(record, picture.resize((width, height)) if width * height < 10**4 else picture)
    scene = replace(scene, picture=scene.picture[:, :1, :1].expand(3, height, width))
    left_right = record_of_scene(mirrored(scene), record)
    top_bottom = record_of_scene(mirrored(scene, top_for_bottom=True), record)
    a, b, c, d = box.bins
    assert left_right.objects[0].bins == (999 - c, b, 999 - a, d)
    assert top_bottom.objects[0].bins == (a, 999 - d, c, 999 - b)
    assert left_right.objects[1].bins[0::2] == tuple(999 - x for x in outline.bins[0::2])
    assert left_right.objects[1].bins[1::2] == outline.bins[1::2]
    assert record_of_scene(scene, record) == record


def square(*objects: BoxObject, side: int = 1000) -> tuple[Record, Any]:
    """A picture in which pixel k is bin k."""
    record = Record(("a.png",), side, side, objects)
    return record, scene_of(record, Image.new("RGB", (side, side)))


def test_a_window_cuts_boxes_and_leaves_out_what_is_hardly_left():
    record, scene = square(
        BoxObject("inside", "bbox_2d", (400, 300, 499, 399)),
        BoxObject("half", "bbox_2d", (100, 300, 299, 399)),  # its right half is in the window
        BoxObject("a fifth", "bbox_2d", (120, 500, 219, 599)),
        BoxObject("outside", "bbox_2d", (0, 0, 99, 99)),
    )
    cut = window_of(scene, (200, 200, 400, 400), 0.5)
    objects = {obj.desc: obj.bins for obj in record_of_scene(cut, record).objects}
    # A window of 400 pixels: bin = 999 * pixel / 399.
    assert objects == {
        "inside": tuple(round(999 * x / 399) for x in (200, 100, 299, 199)),
        "half": tuple(round(999 * x / 399) for x in (0, 100, 99, 199)),
    }
    assert cut.size == (400, 400)
    kept = record_of_scene(window_of(scene, (200, 200, 400, 400), 0.15), record).objects
    assert [obj.desc for obj in kept] == ["inside", "half", "a fifth"]


def test_a_window_cuts_outlines_at_its_border():
    diamond = BoxObject("d", "poly", (300, 500, 500, 300, 700, 500, 500, 700))
    record, scene = square(diamond, BoxObject("flat", "poly", (10, 10, 20, 20, 30, 30)))
    # The left half: the window ends at pixel 500, where the diamond is highest.
    cut = record_of_scene(window_of(scene, (0, 0, 1000, 501), 0.4), record)
    corners = np.array(cut.objects[0].bins).reshape(-1, 2)
    assert {tuple(corner) for corner in corners.tolist()} == {(599, 500), (999, 300), (999, 700)}
    assert cut.objects[1].bins == (20, 10, 40, 20, 60, 30)  # inside: as it was, though it has no area
    assert window_of(scene, (0, 0, 1000, 400), 0.4).outlines == [1]  # an eighth of the diamond
    assert window_of(scene, (0, 0, 1000, 400), 0.12).outlines == [0, 1]


def test_a_scaled_box_stays_around_its_pixels():
    """Pixels 100 to 199, twice as large, are pixels 200 to 399: the last pixel is 2 * 199 + 1."""
    record, scene = square(BoxObject("a", "bbox_2d", (100, 100, 199, 199)))
    doubled = record_of_scene(scaled(scene, 2000, 2000), record)
    assert doubled.objects[0].bins == tuple(round(999 * x / 1999) for x in (200, 200, 399, 399))
    # Of ten pixels the sixth: less than a pixel is left of the object, and its box is one bin wide.
    tiny, scene = square(BoxObject("a", "bbox_2d", (500, 500, 501, 502)))
    assert record_of_scene(scaled(scene, 10, 10), tiny).objects[0].bins == (555, 555, 556, 556)


CROP = {"name": "random_crop", "params": {"scale": [0.3, 0.9]}}
FLIP = {"name": "hflip", "params": {"prob": 0.5}}
COLOR = {"name": "color_jitter", "params": {"brightness": [0.5, 1.5], "contrast": [0.8, 1.2]}}


@pytest.fixture(scope="module")
def record(folder: Path) -> Record:
    (folder / "small").mkdir()
    return write_scene(folder / "small", [(5, 5, 30, 30), (50, 40, 90, 70)], (120, 80))


def same(one: Augmented, other: Augmented) -> bool:
    return one.record == other.record and one.picture.tobytes() == other.picture.tobytes()


def test_the_same_turn_gives_the_same_sample_and_another_one_another(record: Record):
    ops = [CROP, FLIP, COLOR]
    turns = [make(ops, seed=3)(record, turn=str(turn)) for turn in range(6)]
    again = make(ops, seed=3)
    for turn in (4, 1, 5):  # in any order
        assert same(again(record, turn=str(turn)), turns[turn])
    assert not any(same(turns[0], other) for other in turns[1:])
    assert not same(make(ops, seed=4)(record, turn="0"), turns[0])
    elsewhere = replace(record, line=8)
    assert not same(make(ops, seed=3)(elsewhere, turn="0"), turns[0])


def test_numbers_are_those_of_every_machine():
    draws = Draws(3, "train.jsonl", 7, ("a.png",), "2")
    numbers = [draws.between(0, 1), draws.between(-10, 10), draws.below(1000), draws.chance(0.5)]
    assert numbers == [pytest.approx(0.5068398007528158), pytest.approx(-5.947756580769507), 462, True]


def test_probabilities_are_kept(record: Record):
    flipped = [
        make([FLIP], bypass_prob=0.4)(record, turn=str(turn)).record.objects != record.objects
        for turn in range(400)
    ]
    assert 0.3 - 0.07 < np.mean(flipped) < 0.3 + 0.07  # 0.6 * 0.5, three standard deviations
    assert not any(
        make([FLIP], bypass_prob=1.0)(record, turn=str(turn)).record != record for turn in range(20)
    )


def test_phases_change_probabilities_over_the_run(record: Record):
    curriculum = {
        "phases": [
            {"until_percent": 20, "ops": {"hflip": {"prob": 0.0}}},
            {"until_percent": 60, "ops": {"hflip": {"prob": 1.0}}},
            {"until_percent": 100, "bypass_prob": 1.0},
        ]
    }
    augmenter = make([FLIP], curriculum=curriculum)
    flipped = augmenter(record, progress=0.5)
    assert flipped.record.objects[0].bins[0] == 999 - record.objects[0].bins[2]
    for progress, expected in ((0.0, record), (0.19, record), (0.2, flipped.record), (0.59, flipped.record),
                               (0.6, record), (1.0, record)):  # fmt: skip
        assert all(
            augmenter(record, turn=str(turn), progress=progress).record == expected for turn in range(5)
        )


def test_a_window_shows_as_many_objects_as_asked_for(record: Record):
    few = {"name": "random_crop", "params": {"scale": [0.05, 0.1], "min_objects": 1}}
    both = {"name": "random_crop", "params": {"scale": [0.05, 0.1], "min_objects": 5}}
    for turn in range(20):
        assert len(make([few])(record, turn=str(turn)).record.objects) >= 1
        assert make([both])(record, turn=str(turn)).record == record  # no such window shows both


def test_shapes_stay_where_they_are_when_only_values_change(record: Record, tmp_path: Path):
    noise = np.random.default_rng(0).integers(20, 220, (80, 120, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "scene.png")
    record = replace(record, file=str(tmp_path / "d.jsonl"))
    ops = [
        COLOR, {"name": "hsv", "params": {"hue_delta_deg": [-30, 30], "sat": [0.5, 1.5], "val": [0.5, 1.5]}},
        {"name": "gamma", "params": {"gamma": [0.5, 2.0]}}, {"name": "sharpness", "params": {"factor": [0.5, 2.0]}},
        {"name": "blur", "params": {"sigma": [0.5, 2.0]}}, {"name": "auto_contrast"},
        {"name": "grayscale", "params": {"prob": 1.0}},
    ]  # fmt: skip
    before = np.asarray(make([FLIP], bypass_prob=1.0)(record).picture)
    for op in ops:
        after = make([op])(record)
        assert after.record == record
        assert (np.asarray(after.picture) != before).mean() > 0.5, op
    together = make(ops)(record)
    assert together.record == record
    channels = np.asarray(together.picture)
    assert (channels[..., 0] == channels[..., 1]).all()


def test_brightness_is_a_factor(record: Record):
    dark = make([{"name": "color_jitter", "params": {"brightness": [0.5, 0.5]}}])(record)
    before = np.asarray(make([FLIP], bypass_prob=1.0)(record).picture, dtype=float)
    assert np.abs(np.asarray(dark.picture) - before / 2).max() <= 1


def test_what_cannot_be_augmented_is_named(record: Record):
    two = replace(record, images=("scene.png", "scene.png"))
    with pytest.raises(RecordError, match=r"d\.jsonl:7: has 2 pictures"):
        make([FLIP])(two)
    with pytest.raises(RecordError, match=r"d\.jsonl:7: image .*gone\.png does not exist"):
        make([FLIP])(replace(record, images=("gone.png",)))
    with pytest.raises(
        RecordError, match=r"d\.jsonl:7: .* is 120 x 80 pixels by now, its record says 121 x 80"
    ):
        make([FLIP])(replace(record, width=121))
