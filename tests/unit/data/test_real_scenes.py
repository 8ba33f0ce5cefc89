"""Scenes between the pixels: coverage against areas, labels against pixels, bins in use, what a reader can reach."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.data.real_scenes import coverage
from coordexp.data.scene_config import KINDS, PRESETS, ShapesConfig
from coordexp.data.shapes import STAMP_NAME, generate_shapes, render_scene, scene_record
from coordexp.errors import ConfigError
from coordexp.eval.coco import evaluate_coco

REAL = sorted(name for name, config in PRESETS.items() if config.real_valued)
AREAS = {
    "box": 1.0,
    "cross": 5 / 9,
    "circle": np.pi / 4,
    "ellipse": np.pi / 4,
    "diamond": 0.5,
    "triangle": 0.5,
}
sides = st.floats(6, 20)


def test_a_box_covers_shares_of_pixels_worked_by_hand():
    # columns 1.5 to 3.75: half of nothing left of 1.5, all of 2 and 3, a quarter of 4; rows 0 to 1: half, half
    cover = coverage("box", (1.5, 0.0, 3.75, 1.0), 6, 3)
    np.testing.assert_allclose(cover[0], [0, 0, 0.5, 0.5, 0.125, 0])
    np.testing.assert_allclose(cover[1], cover[0])
    assert not cover[2].any()


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), x=st.floats(0, 8), y=st.floats(0, 8), w=sides, h=sides)
def test_coverage_sums_to_the_area_and_stays_inside_the_box(kind, x, y, w, h):
    cover = coverage(kind, (x, y, x + w, y + h), 32, 32)
    exact = kind in ("box", "cross")
    assert cover.sum() == pytest.approx(AREAS[kind] * w * h, rel=1e-9 if exact else 0.05)
    assert cover.min() >= 0
    assert cover.max() <= 1 + 1e-9
    rows, columns = np.nonzero(cover > 0)
    assert columns.min() >= np.floor(x + 0.5)
    assert columns.max() <= np.floor(x + w + 0.5)
    assert rows.min() >= np.floor(y + 0.5)
    assert rows.max() <= np.floor(y + h + 0.5)


@settings(max_examples=40, deadline=None)
@given(x=st.floats(1, 8), w=sides)
def test_the_edges_of_a_box_can_be_read_back(x, w):
    """From one row of coverage, to rounding: sum and centre of mass give both edges."""
    row = coverage("box", (x, 2.0, x + w, 20.0), 32, 32)[10]
    width = row.sum()
    centre = (row * np.arange(32)).sum() / width
    # the centre of mass of a pixel's share lies within it, so half a pixel of error at most on either side
    assert width == pytest.approx(w, abs=1e-9)
    assert centre == pytest.approx(x + w / 2, abs=0.25 / w + 1e-9)


@pytest.mark.parametrize("preset", REAL)
def test_a_perfect_reader_of_the_pixels_reaches_nearly_everything(preset):
    """What later shapes hide is lost: a side whose last pixels are hidden is read at the last visible one."""
    config = PRESETS[preset]
    images, annotations, results = [], [], []
    names = sorted({f"{color} {kind}" for color in config.colors for kind in config.kinds})
    for index in range(150):
        scene = render_scene(config, seed=3, split="val", index=index)
        images.append({"id": index + 1, "width": config.width, "height": config.height})
        covers = [coverage(o.desc.split()[1], o.box_xyxy, config.width, config.height) for o in scene.objects]
        for number, one in enumerate(scene.objects):
            hidden = np.max([np.zeros((config.height, config.width)), *covers[number + 1 :]], axis=0)
            read = visible_box(one.box_xyxy, covers[number], hidden)
            category = names.index(one.desc) + 1
            for rows, box in ((annotations, one.box_xyxy), (results, read)):
                xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
                entry = {"image_id": index + 1, "category_id": category, "bbox": xywh}
                rows.append(entry | {"id": len(rows) + 1, "iscrowd": 0, "area": xywh[2] * xywh[3]})
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    gt = {"images": images, "annotations": annotations, "categories": categories}
    found = [
        {key: row[key] for key in ("image_id", "category_id", "bbox")} | {"score": 1.0} for row in results
    ]
    metrics = evaluate_coco(gt, found)
    assert metrics["AP50"] == pytest.approx(1.0)
    assert metrics["AP"] > 0.98


def visible_box(box, cover, hidden):
    """The true side where its outermost pixels show, the last visible pixel's border where they are hidden."""
    shown = (cover > 0) & (hidden < 0.999)
    full = cover > 0
    read = list(box)
    for axis, (low, high) in ((0, (0, 2)), (1, (1, 3))):
        seen, all_of = np.flatnonzero(shown.any(axis=axis)), np.flatnonzero(full.any(axis=axis))
        if seen[0] != all_of[0]:
            read[low] = seen[0] - 0.5
        if seen[-1] != all_of[-1]:
            read[high] = seen[-1] + 0.5
    return read


def test_nearly_every_bin_occurs_where_whole_pixels_leave_most_unused():
    used = {name: Counter() for name in ("few", "demo", "pixels")}
    for name, bins in used.items():
        for index in range(1500):
            record = scene_record(render_scene(PRESETS[name], seed=0, split="train", index=index), "x.png")
            bins.update(value for one in record["objects"] for value in one["bbox_2d"])
    assert len(used["pixels"]) <= 64
    assert len(used["few"]) > 950
    assert len(used["demo"]) > 950


def records(root: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (root / f"{split}.jsonl").read_text().splitlines()]


def test_partial_leaves_labels_out_of_training_scenes_alone(tmp_path: Path):
    config = PRESETS["partial"]
    generate_shapes(tmp_path / "some", config, num_train=400, num_val=100, seed=5)
    complete = ShapesConfig(**{**asdict(config), "unlabelled": 0.0})
    generate_shapes(tmp_path / "all", complete, num_train=400, num_val=100, seed=5)
    assert records(tmp_path / "some", "val") == records(tmp_path / "all", "val")
    pairs = list(zip(records(tmp_path / "some", "train"), records(tmp_path / "all", "train"), strict=True))
    assert all(one in whole["objects"] for some, whole in pairs for one in some["objects"])
    kept, total = (sum(len(pair[side]["objects"]) for pair in pairs) for side in (0, 1))
    assert kept / total == pytest.approx(0.6, abs=0.05)
    images = "images/train/000007.png"
    assert (tmp_path / "some" / images).read_bytes() == (tmp_path / "all" / images).read_bytes()


def test_names_of_the_long_tail_are_uneven_and_all_there():
    names = Counter(
        one.desc
        for index in range(3000)
        for one in render_scene(PRESETS["long_tail"], seed=0, split="train", index=index).objects
    )
    assert len(names) == 48
    counts = sorted(names.values(), reverse=True)
    assert counts[0] > 20 * counts[-1]


def test_scenes_are_the_same_again_and_old_stamps_stay_valid(tmp_path: Path):
    first, again = (render_scene(PRESETS["crowded"], seed=1, split="val", index=4) for _ in range(2))
    assert first.objects == again.objects
    np.testing.assert_array_equal(first.pixels, again.pixels)
    assert 3 <= len(first.objects) <= 8
    generate_shapes(tmp_path / "pixels", PRESETS["pixels"], num_train=1, num_val=1)
    stamp = json.loads((tmp_path / "pixels" / STAMP_NAME).read_text())
    assert not {"real_valued", "unlabelled", "name_skew"} & set(stamp)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"unlabelled": 1.0}, "0 <= unlabelled < 1"),
        ({"name_skew": -1.0, "real_valued": True}, "name_skew"),
        ({"name_skew": 1.0}, "0 on whole pixels"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values, told):
    with pytest.raises(ConfigError, match=told):
        ShapesConfig(**values)
