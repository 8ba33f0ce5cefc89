"""Out and in again: every format keeps names, classes and boxes, also by way of the package's JSONL (half a bin)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.annotated import NAMES, coco, half_bins, objects_of, source

from coordexp.codec.records import read_jsonl
from coordexp.data.check.source import Source
from coordexp.data.formats.convert import convert
from coordexp.data.formats.exports.coco import export_source
from coordexp.data.formats.exports.labelme import export_labelme
from coordexp.data.formats.exports.xml import export_cvat, export_voc
from coordexp.data.formats.exports.yolo import export_yolo
from coordexp.data.formats.options import ImportOptions
from coordexp.data.formats.readers.builder import Faults
from coordexp.data.formats.readers.jsonl import read_data_file
from coordexp.data.formats.readers.sources import read_sources, recognised

FIND = ImportOptions(find_pictures=True)


def write_coco(found: Source, output: Path) -> Path:
    export_source(found, output / "gt.json")
    for picture, name in zip(found.pictures, found.dataset.file_names, strict=True):
        assert picture is not None
        (output / name).symlink_to(picture)
    return output / "gt.json"


def to_folder(export: Callable[..., object]) -> Callable[[Source, Path], Path]:
    def write(found: Source, output: Path) -> Path:
        export([found], output / "out")
        return output / "out"

    return write


WRITERS = {
    "coco": write_coco,
    "yolo": to_folder(export_yolo),
    "voc": to_folder(export_voc),
    "labelme": to_folder(export_labelme),
    "cvat": to_folder(export_cvat),
}
EXACT = {"coco": 1e-9, "yolo": 1e-6 * 700, "voc": 0.0051, "labelme": 0.00051, "cvat": 0.0051}
"""Pixels that the decimals of a format cost."""


def assert_same_objects(
    before: Source, after: Source, slack: Callable[[tuple[int, int]], np.ndarray]
) -> None:
    """The same images with the same names and boxes, in any order, boxes within `slack` of a picture's size."""
    assert after.dataset.sizes_N2.tolist() == before.dataset.sizes_N2.tolist()
    for row, (expected, found) in enumerate(zip(objects_of(before), objects_of(after), strict=True)):
        assert sorted(name for name, _ in found) == sorted(name for name, _ in expected)
        width, height = before.dataset.sizes_N2[row].tolist()
        left = list(found)
        for name, box in expected:
            near = [
                o
                for o in left
                if o[0] == name and (np.abs(np.subtract(o[1], box)) <= slack((width, height))).all()
            ]
            assert near, (name, box, left)
            left.remove(near[0])


sizes = st.tuples(st.integers(8, 700), st.integers(8, 700))
shares = st.tuples(st.floats(0, 0.9), st.floats(0, 0.9), st.floats(0.05, 1), st.floats(0.05, 1))


@st.composite
def data_sets(draw: st.DrawFn) -> dict:
    """One to three images of any size with boxes between the centres of the first and last pixels."""
    shapes = draw(st.lists(sizes, min_size=1, max_size=3))
    objects = []
    for image, (width, height) in enumerate(shapes):
        for x, y, w, h in draw(st.lists(shares, max_size=4)):
            box = (
                x * (width - 1),
                y * (height - 1),
                min(w, 1 - x) * (width - 1),
                min(h, 1 - y) * (height - 1),
            )
            if min(box[2:]) > 1.1:
                objects.append((image, draw(st.integers(0, 2)), box))
    if not objects:
        objects.append((0, 0, (1.0, 1.0, 5.5, 5.5)))
    return coco(shapes, objects)


@pytest.mark.parametrize("format_name", WRITERS)
@settings(max_examples=15, deadline=None)
@given(value=data_sets())
def test_a_format_gives_back_what_was_written(format_name: str, value: dict):
    with tempfile.TemporaryDirectory() as folder:
        before = source(Path(folder) / "pictures", value)
        output = Path(folder) / "export"
        output.mkdir()
        path = WRITERS[format_name](before, output)
        assert recognised(path) == format_name
        [after] = read_sources(path, FIND)
        assert_same_objects(before, after, lambda size: np.full(4, EXACT[format_name]))
        assert all(picture is not None and picture.is_file() for picture in after.pictures)


@pytest.mark.parametrize("format_name", WRITERS)
@settings(max_examples=15, deadline=None)
@given(value=data_sets())
def test_by_way_of_jsonl_boxes_keep_within_half_a_bin(format_name: str, value: dict):
    with tempfile.TemporaryDirectory() as folder:
        before = source(Path(folder) / "pictures", value)
        first, second = Path(folder) / "first", Path(folder) / "second"
        first.mkdir()
        second.mkdir()
        [given_source] = read_sources(WRITERS[format_name](before, first), FIND)
        converted = convert(given_source, Path(folder) / "data.jsonl", ImportOptions())
        assert converted.counts["objects_written"] == len(before.dataset)
        records = read_jsonl(Path(folder) / "data.jsonl", require_images=True)
        assert [record.images[0].endswith(".png") for record in records] == [True] * len(records)
        back = WRITERS[format_name](read_data_file(Path(folder) / "data.jsonl", Faults()), second)
        [after] = read_sources(back, FIND)
        assert_same_objects(before, after, lambda size: half_bins(size) + 3 * EXACT[format_name])


OUTLINE = [20.0, 10.0, 80.0, 15.0, 75.0, 60.0, 30.0, 70.0]


@pytest.mark.parametrize("format_name", WRITERS)
def test_outlines_survive_where_the_format_has_them(format_name: str, tmp_path: Path):
    value = coco([(100, 80)], [(0, 0, (20, 10, 60, 60))], segmentation=[OUTLINE])
    before = source(tmp_path / "pictures", value)
    output = tmp_path / "export"
    output.mkdir()
    if format_name == "yolo":
        export_yolo([before], output / "out", polygons=True)
        path = output / "out"
    else:
        path = WRITERS[format_name](before, output)
    [after] = read_sources(path, FIND)
    convert(after, tmp_path / "data.jsonl", ImportOptions(polygons=True))
    [record] = read_jsonl(tmp_path / "data.jsonl")
    if format_name == "voc":
        assert [obj.kind for obj in record.objects] == ["bbox_2d"]
        return
    expected = [999 * v / (99 if i % 2 == 0 else 79) for i, v in enumerate(OUTLINE)]
    assert [obj.kind for obj in record.objects] == ["poly"]
    assert np.abs(np.subtract(record.objects[0].bins, expected)).max() <= 0.6


def test_splits_go_out_and_come_in_by_name(tmp_path: Path):
    train = source(tmp_path / "a", coco([(64, 48)], [(0, 0, (5, 5, 20, 20))]), split="train")
    val = source(tmp_path / "b", coco([(30, 40), (64, 48)], [(1, 2, (9, 9, 30, 30))]), split="val")
    for format_name, export in {"yolo": export_yolo, "voc": export_voc, "cvat": export_cvat}.items():
        export([train, val], tmp_path / format_name)
        found = read_sources(tmp_path / format_name, FIND)
        assert [(part.split, len(part.dataset.image_ids)) for part in found] == [("train", 1), ("val", 2)]
        [one] = read_sources(tmp_path / format_name, ImportOptions(split="val"))
        assert objects_of(one)[1][0][0] == NAMES[2]


def test_yolo_numbers_are_those_of_the_names_that_are_given(tmp_path: Path):
    found = source(tmp_path / "a", coco([(64, 48)], [(0, 1, (16, 12, 32, 24))]), split="train")
    export_yolo([found], tmp_path / "out", names=["x", "dog", "y"], pictures="copy")
    assert (
        tmp_path / "out/labels/train/picture 0.txt"
    ).read_text() == "1 0.500000 0.500000 0.500000 0.500000\n"
    assert not (tmp_path / "out/images/train/picture 0.png").is_symlink()
    assert "val: images/train" in (tmp_path / "out/data.yaml").read_text()
