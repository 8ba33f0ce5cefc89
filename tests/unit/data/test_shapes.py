"""Synthetic scenes: boxes agree with the pixels, files with the contract, runs with each other."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from coordexp.data.shapes import (
    COLORS,
    KINDS,
    PRESETS,
    ShapesConfig,
    asked_classes,
    generate_shapes,
    render_scene,
    scene_record,
)
from coordexp.errors import ConfigError

PIXELS = PRESETS["pixels"]
WHOLE_PIXELS = sorted(name for name, config in PRESETS.items() if not config.real_valued)


def _records(root: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (root / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def _tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _pixels_near_color(pixels: np.ndarray, color: str) -> np.ndarray:
    return np.abs(pixels.astype(int) - COLORS[color]).max(axis=-1) <= 14


@pytest.fixture(scope="module")
def pixels_dir(tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("shapes") / "pixels"
    assert generate_shapes(output_dir, PIXELS, num_train=300, num_val=60)
    return output_dir


@settings(max_examples=80, deadline=None)
@given(index=st.integers(0, 10**6), seed=st.integers(0, 100), preset=st.sampled_from(WHOLE_PIXELS))
def test_every_box_is_the_tight_box_of_that_objects_visible_pixels(index, seed, preset):
    """Independent check: find the pixels again by colour, inside the box and in the ring around it."""
    scene = render_scene(PRESETS[preset], seed=seed, split="train", index=index)
    for scene_object in scene.objects:
        x1, y1, x2, y2 = scene_object.box_xyxy
        near = _pixels_near_color(scene.pixels, scene_object.desc.split()[0])
        inside = near[y1 : y2 + 1, x1 : x2 + 1]
        assert inside[0].any()
        assert inside[-1].any()
        assert inside[:, 0].any()
        assert inside[:, -1].any()


@settings(max_examples=60, deadline=None)
@given(index=st.integers(0, 10**6))
def test_lone_objects_fill_their_box_and_nothing_lies_outside(index):
    scene = render_scene(replace(PIXELS, max_objects=1), seed=3, split="val", index=index)
    [scene_object] = scene.objects
    rows, columns = np.nonzero(_pixels_near_color(scene.pixels, scene_object.desc.split()[0]))
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == scene_object.box_xyxy
    x1, y1, x2, y2 = scene_object.box_xyxy
    assert 20 <= x2 - x1 + 1 <= 40
    assert 20 <= y2 - y1 + 1 <= 40


@pytest.mark.parametrize(
    ("kind", "share"),
    [
        ("box", 1.0),
        ("circle", np.pi / 4),
        ("ellipse", np.pi / 4),
        ("triangle", 0.5),
        ("diamond", 0.5),
        ("cross", 5 / 9),
    ],
)
def test_kinds_cover_the_share_of_their_box_that_geometry_says(kind, share):
    config = ShapesConfig(width=256, height=256, min_side=200, max_side=200, kinds=(kind,), max_objects=1)
    scene = render_scene(config, seed=0, split="train", index=0)
    area = _pixels_near_color(scene.pixels, scene.objects[0].desc.split()[0]).sum()
    assert area / 200**2 == pytest.approx(share, abs=0.015)


def test_hidden_share_of_an_object_stays_below_max_overlap():
    """A box that lost a share h of its pixels shows 1 - h; overlap 0.2 leaves 80 % of every rectangle."""
    config = replace(PIXELS, kinds=("box",), min_objects=2, colors=("red", "blue"))
    touched = 0
    for index in range(300):
        scene = render_scene(config, seed=0, split="train", index=index)
        for scene_object in scene.objects:
            x1, y1, x2, y2 = scene_object.box_xyxy
            near = _pixels_near_color(scene.pixels, scene_object.desc.split()[0])[y1 : y2 + 1, x1 : x2 + 1]
            assert near.mean() >= 0.8
            touched += near.mean() < 1.0
    assert touched > 10  # overlaps do occur


def test_neighbours_never_share_a_colour_while_colours_are_left():
    config = replace(PIXELS, min_objects=2, kinds=("box",))
    for index in range(200):
        first, second = render_scene(config, seed=1, split="train", index=index).objects
        (a1, b1, a2, b2), (c1, d1, c2, d2) = first.box_xyxy, second.box_xyxy
        if a1 <= c2 + 1 and c1 <= a2 + 1 and b1 <= d2 + 1 and d1 <= b2 + 1:
            assert first.desc != second.desc


def test_records_state_what_the_image_shows(pixels_dir):
    for split, count in (("train", 300), ("val", 60)):
        records = _records(pixels_dir, split)
        assert len(records) == count
        for index, record in enumerate(records):
            assert set(record) == {"images", "width", "height", "objects"}
            scene = render_scene(PIXELS, seed=0, split=split, index=index)
            with Image.open(pixels_dir / record["images"][0]) as image:
                assert image.size == (record["width"], record["height"]) == (64, 64)
                np.testing.assert_array_equal(np.asarray(image), scene.pixels)
            found = Counter((o["desc"], *o["bbox_2d"]) for o in record["objects"])
            expected = Counter((o.desc, *(round(999 * v / 63) for v in o.box_xyxy)) for o in scene.objects)
            assert found == expected


def test_objects_are_sorted_and_boxes_have_area_in_bins(pixels_dir):
    for record in _records(pixels_dir, "train") + _records(pixels_dir, "val"):
        keys = [(o["bbox_2d"][1], o["bbox_2d"][0]) for o in record["objects"]]
        assert keys == sorted(keys)
        for x1, y1, x2, y2 in (o["bbox_2d"] for o in record["objects"]):
            assert 0 <= x1 < x2 <= 999
            assert 0 <= y1 < y2 <= 999


def test_bins_use_width_for_x_and_height_for_y():
    config = ShapesConfig(width=96, height=48, min_side=8, max_side=20)
    scene = render_scene(config, seed=0, split="train", index=4)
    record = scene_record(scene, "a.png")
    assert (record["width"], record["height"]) == (96, 48)
    expected = {
        tuple(round(999 * v / (95, 47)[i % 2]) for i, v in enumerate(o.box_xyxy)) for o in scene.objects
    }
    assert {tuple(o["bbox_2d"]) for o in record["objects"]} == expected


def test_every_kind_colour_and_count_appears_about_evenly(pixels_dir):
    records = _records(pixels_dir, "train")
    descs = Counter(o["desc"] for r in records for o in r["objects"])
    assert set(descs) == {f"{color} {kind}" for color in PIXELS.colors for kind in PIXELS.kinds}
    assert max(descs.values()) < 3 * min(descs.values())
    counts = Counter(len(r["objects"]) for r in records)
    assert set(counts) == {1, 2}
    assert 0.3 < counts[1] / len(records) < 0.7


def test_positions_spread_over_the_whole_image(pixels_dir):
    boxes = np.array([o["bbox_2d"] for r in _records(pixels_dir, "train") for o in r["objects"]])
    assert boxes[:, :2].min() == 0
    assert boxes[:, 2:].max() == 999
    assert boxes.std(axis=0).min() > 150  # bins; a generator stuck in one corner would be far below


def test_splits_share_no_image(pixels_dir):
    train, val = ({p.read_bytes() for p in (pixels_dir / "images" / s).iterdir()} for s in ("train", "val"))
    assert len(train) == 300
    assert len(val) == 60
    assert not train & val


def test_same_parameters_give_the_same_bytes(pixels_dir, tmp_path):
    generate_shapes(tmp_path / "again", PIXELS, num_train=300, num_val=60)
    assert _tree(tmp_path / "again") == _tree(pixels_dir)


def test_more_scenes_leave_the_earlier_ones_as_they_were(pixels_dir, tmp_path):
    generate_shapes(tmp_path / "more", PIXELS, num_train=310, num_val=70)
    for split, count in (("train", 300), ("val", 60)):
        assert _records(tmp_path / "more", split)[:count] == _records(pixels_dir, split)
    few, more = _tree(pixels_dir), _tree(tmp_path / "more")
    assert all(more[name] == data for name, data in few.items() if name.startswith("images/"))


def test_another_seed_gives_other_scenes(pixels_dir, tmp_path):
    generate_shapes(tmp_path / "seed1", PIXELS, num_train=20, num_val=0, seed=1)
    assert not set(map(str, _records(tmp_path / "seed1", "train"))) & set(
        map(str, _records(pixels_dir, "train"))
    )


def test_empty_fraction_gives_scenes_without_objects(tmp_path):
    generate_shapes(tmp_path / "half", replace(PIXELS, empty_fraction=0.5), num_train=400, num_val=0)
    num_empty = sum(not r["objects"] for r in _records(tmp_path / "half", "train"))
    assert 150 < num_empty < 250
    generate_shapes(tmp_path / "all", replace(PIXELS, empty_fraction=1.0), num_train=3, num_val=1)
    assert [r["objects"] for r in _records(tmp_path / "all", "train")] == [[], [], []]


def test_backgrounds_vary_unless_plain_is_asked_for():
    def corners(config):
        scenes = (render_scene(config, seed=0, split="train", index=i) for i in range(50))
        return {tuple(scene.pixels.reshape(-1, 3).max(axis=0)) for scene in scenes}

    assert len(corners(PIXELS)) > 25
    assert corners(replace(PIXELS, varied_background=False, max_objects=1)) == {(240, 240, 240)}


def test_rerun_is_up_to_date_and_other_parameters_are_refused(tmp_path):
    out = tmp_path / "s"
    assert generate_shapes(out, PIXELS, num_train=2, num_val=1) is True
    stamp_time = (out / "train.jsonl").stat().st_mtime_ns
    assert generate_shapes(out, PIXELS, num_train=2, num_val=1) is False
    assert (out / "train.jsonl").stat().st_mtime_ns == stamp_time
    with pytest.raises(ConfigError, match=r"max_side: 40 there, 20 asked for; train: 2 there, 3 asked for"):
        generate_shapes(out, replace(PIXELS, max_side=20), num_train=3, num_val=1)
    assert generate_shapes(out, PIXELS, num_train=1, num_val=1, force=True) is True
    assert len(_records(out, "train")) == 1


def test_force_never_replaces_a_directory_of_something_else(tmp_path):
    (tmp_path / "precious.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="not empty"):
        generate_shapes(tmp_path, PIXELS, num_train=1, num_val=1, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_scenes_that_cannot_be_drawn_leave_no_directory(tmp_path):
    config = replace(PIXELS, min_objects=8, max_objects=8, max_overlap=0.0)
    with pytest.raises(ConfigError, match=r"8 objects of 20\.\.40 px do not fit a 64x64 image"):
        generate_shapes(tmp_path / "out", config, num_train=1, num_val=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": ("box", "star")}, "kinds = star: expected some of box, circle"),
        ({"colors": ()}, "colors = : expected some of red"),
        ({"min_objects": 3}, r"min_objects..max_objects = 3..2: expected 1 <= min_objects"),
        ({"max_side": 65}, r"min_side..max_side = 20..65: expected 6 <= min_side <= max_side <= 64"),
        ({"max_overlap": 1.0}, "max_overlap = 1.0: expected 0 <= max_overlap < 1"),
        ({"empty_fraction": -0.1}, "empty_fraction = -0.1"),
    ],
)
def test_unusable_configurations_name_the_field(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(PIXELS, **change)


def test_presets_use_image_sides_that_the_tiny_model_takes_without_resizing():
    for config in PRESETS.values():
        assert config.width % 16 == config.height % 16 == 0
    assert set(PRESETS["hard"].kinds) == set(KINDS)


def test_a_picture_is_asked_for_all_shapes_in_some_colors(tmp_path):
    """Its objects are those of the whole scene whose names are on its list; the others are in the picture alone."""
    config = replace(PIXELS, min_objects=2, max_objects=3, max_side=24, asked_colors=2)
    generate_shapes(tmp_path / "asked", config, num_train=40, num_val=5)
    generate_shapes(tmp_path / "all", replace(config, asked_colors=0), num_train=40, num_val=5)
    num_left_out = 0
    for asked, everything in zip(
        _records(tmp_path / "asked", "train"), _records(tmp_path / "all", "train"), strict=True
    ):
        names = set(asked["classes"])
        colors = {name.split()[0] for name in names}
        assert len(asked["classes"]) == len(names) == 4 * len(KINDS)
        assert len(colors & set(config.colors)) == 2
        assert len(colors - set(config.colors)) == 2
        assert asked["objects"] == [obj for obj in everything["objects"] if obj["desc"] in names]
        num_left_out += len(everything["objects"]) - len(asked["objects"])
    assert num_left_out > 20
    pictures = [(tmp_path / name / "images/train/000003.png").read_bytes() for name in ("asked", "all")]
    assert pictures[0] == pictures[1]


def test_lists_are_new_for_every_picture_or_as_many_as_asked_for():
    config = replace(PIXELS, colors=tuple(COLORS), asked_colors=4)

    def lists(config: ShapesConfig) -> list[tuple[str, ...]]:
        return [
            asked_classes(config, seed=1, split=split, index=n)
            for split in ("train", "val")
            for n in range(40)
        ]

    assert len(set(lists(config))) == 80
    assert len(set(lists(replace(config, num_lists=3)))) == 3
    assert set(lists(replace(config, num_lists=3))[:40]) == set(lists(replace(config, num_lists=3))[40:])


@pytest.mark.parametrize(
    ("changes", "fault"),
    [({"asked_colors": 5}, r"asked_colors = 5: expected 0..4"), ({"num_lists": 2}, "0 without asked_colors")],
)
def test_lists_that_cannot_be_drawn_are_refused(changes, fault):
    with pytest.raises(ConfigError, match=fault):
        replace(PIXELS, **changes)
