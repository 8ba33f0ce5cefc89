"""VOC, LabelMe, CVAT and our own files: read for what they mean, or named with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.annotated import SIZE, noise, objects_of, read, write

from coordexp.data.formats.options import ImportOptions
from coordexp.data.formats.readers.builder import Faults
from coordexp.data.formats.readers.jsonl import read_data_file
from coordexp.data.formats.readers.sources import read_sources, recognised
from coordexp.data.formats.readers.xml_input import size_of
from coordexp.errors import RecordError

# Pascal VOC


def voc_text(objects: str, size: str = "<size><width>100</width><height>50</height></size>") -> str:
    return f"<annotation><filename>a.png</filename>{size}{objects}</annotation>"


def voc_object(x1: Any, y1: Any, x2: Any, y2: Any, name: str = "cat", more: str = "") -> str:
    box = f"<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>"
    return f"<object><name>{name}</name>{box}{more}</object>"


def voc(folder: Path, text: str) -> Path:
    noise(folder / "JPEGImages/a.png", SIZE)
    write(folder / "Annotations/a.xml", text)
    return folder


def test_voc_counts_from_1_unless_a_0_stands_there(tmp_path: Path):
    [found] = read(
        voc(tmp_path, voc_text(voc_object(1, 1, 100, 50) + voc_object(11, "21.5", 30, 40, " dog ")))
    )
    assert objects_of(found) == [[("cat", [0, 0, 100, 50]), ("dog", [10, 20.5, 30, 40])]]
    assert found.findings == ()
    assert found.dataset.place(1) == "Annotations/a.xml: object 2"
    [found] = read(voc(tmp_path, voc_text(voc_object(0, 0, 99, 49) + voc_object(11, 21, 30, 40))))
    assert objects_of(found) == [[("cat", [0, 0, 99, 49]), ("cat", [11, 21, 30, 40])]]
    assert [(finding.level, finding.kind) for finding in found.findings] == [("note", "voc_counts_from_0")]


def test_voc_is_read_as_supervision_reads_it(tmp_path: Path):
    supervision = pytest.importorskip("supervision")
    voc(tmp_path, voc_text(voc_object(3, 4, 50, 45) + voc_object(11, 21, 30, 40, "dog")))
    reference = supervision.DetectionDataset.from_pascal_voc(
        str(tmp_path / "JPEGImages"), str(tmp_path / "Annotations")
    )
    [(_, _, detections)] = list(reference)
    [found] = read(tmp_path)
    assert sorted(detections.xyxy.tolist()) == [box for _, box in objects_of(found)[0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (voc_text(voc_object(50, 4, 3, 45)), r"a\.xml: object 1 has the box .*: expected x1 <= x2 .* swapped\?"),
        (voc_text(voc_object(5, 4, "", 45)), r"a\.xml: object 1\.xmax is ''?.*: expected a number"),
        (voc_text(voc_object(5, 4, "1e999", 45)), r"a\.xml: object 1 has the box .*inf.*: expected finite"),
        (voc_text(voc_object(5, 4, 9, 45, "")), r"a\.xml: object 1 has the name '': expected the name of a class"),
        (voc_text("<object><name>cat</name></object>"), r"a\.xml: object 1 has no bndbox: expected xmin, ymin"),
        (voc_text("", "<size><width>x</width></size>"), r"a\.xml: width is 'x': expected a number"),
        ("<annotation>", r"a\.xml: is not valid XML \(no element found: line 1"),
        ("", r"a\.xml: is not valid XML"),
        ("<!DOCTYPE d [<!ENTITY a 'a'><!ENTITY b '&a;&a;'>]><annotation>&b;</annotation>", r"a\.xml: defines entities"),
        ("<!DOCTYPE d [<!ENTITY x SYSTEM 'file:///etc/group'>]><a>&x;</a>", r"a\.xml: defines entities"),
        (voc_text("").replace("a.png", "../../a.png"), r"filename is '\.\./\.\./a\.png', which leads outside"),
    ],
)  # fmt: skip
def test_a_voc_file_that_cannot_be_read_is_named(tmp_path: Path, text: str, message: str):
    with pytest.raises(RecordError, match=message):
        read_sources(voc(tmp_path, text), ImportOptions(), format_name="voc")
    faults = Faults(collect=True)
    read_sources(tmp_path, ImportOptions(), format_name="voc", faults=faults)
    assert len(faults.messages) == 1


def test_voc_pictures_and_outlines_and_sizes_that_are_not_there(tmp_path: Path):
    polygon = "<polygon><x1>11</x1><y1>11</y1><x2>31</x2><y2>11</y2><x3>31</x3><y3>41</y3></polygon>"
    text = voc_text(voc_object(11, 11, 31, 41, more=polygon), size="").replace("a.png", "a")
    [found] = read(voc(tmp_path, text))
    assert found.pictures == [tmp_path / "JPEGImages/a.png"]
    assert found.dataset.segmentations == [[[10, 10, 30, 10, 30, 40]]]
    assert found.dataset.sizes_N2.tolist() == [[0, 0]]  # to be taken from the picture


def test_a_voc_picture_of_infinite_size_is_named():
    with pytest.raises(RecordError, match="width is '1e999': expected a whole number of pixels"):
        size_of("1e999", "width")


# Labelme


def labelme(folder: Path, *shapes: Any, **keys: Any) -> Path:
    noise(folder / "a.png", SIZE)
    content = {"shapes": list(shapes), "imagePath": "a.png", "imageWidth": 100, "imageHeight": 50, **keys}
    write(folder / "a.json", json.dumps(content))
    return folder


def shape(kind: str, *points: Any, label: Any = "cat", **keys: Any) -> dict[str, Any]:
    return {"label": label, "points": list(points), "shape_type": kind, **keys}


def test_labelme_shapes(tmp_path: Path):
    folder = labelme(
        tmp_path,
        shape("rectangle", [50, 40], [10, 20]),  # drawn from the lower right
        shape("polygon", [1, 2], ["31", 2], [31, 12.5], label="dog"),
        shape("circle", [50, 25], [60, 25]),
        shape("point", [5, 5]),
        shape("linestrip", [5, 5], [9, 9], [7, 7]),
        shape("polygon", [60, 5], [70, 5], [70, 15], group_id=3),
        shape("polygon", [80, 5], [90, 5], [90, 25], group_id=3),  # the rest of the same object
        shape("polygon", [60, 30], [70, 30], [70, 40], label="dog", group_id=3),
    )
    [found] = read(folder)
    assert recognised(folder) == "labelme"
    boxes = {(name, tuple(np.round(box, 1))) for name, box in objects_of(found)[0]}
    assert boxes == {
        ("cat", (10, 20, 50, 40)), ("dog", (1, 2, 31, 12.5)), ("cat", (40, 15, 60, 35)), ("cat", (60, 5, 90, 25)),
        ("dog", (60, 30, 70, 40)),
    }  # fmt: skip
    assert found.left_out == {"point_shapes_left_out": 1, "linestrip_shapes_left_out": 1}
    parts = [len(s) if s else 0 for s in found.dataset.segmentations]
    assert sorted(parts) == [0, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("shapes", "keys", "message"),
    [
        ([5], {}, r"a\.json: shapes\[0\] is 5: expected an object with label and points"),
        (
            [shape("rectangle", [1, 2])],
            {},
            r"shapes\[0\] is a 'rectangle' of 1 points: expected rectangle \(2 points\)",
        ),
        ([shape("star", [1, 2], [3, 4], [5, 6])], {}, r"shapes\[0\] is a 'star' of 3 points"),
        (
            [shape("polygon", [1, 2], [3, 4], [5])],
            {},
            r"shapes\[0\]\.points\[2\] is \[5\]: expected \[x, y\] in pixels",
        ),
        ([shape("polygon", [1, 2], [3, 4], [5, None])], {}, r"shapes\[0\]\.points\[2\] is \[5, None\]"),
        ([shape("polygon", [1, 2], [3, 4], [5, 1e300])], {}, r"shapes\[0\]\.points\[2\] is \[5, 1e\+300\]"),
        (
            [shape("polygon", [1, 2], [3, 4], [5, 6], label=None)],
            {},
            r"shapes\[0\]\.label is None: expected text",
        ),
        ([{"label": "cat", "points": "1,2"}], {}, r"shapes\[0\]\.points is '1,2': expected a list"),
        ([], {"imageWidth": "wide"}, r"a\.json: imageWidth is 'wide': expected a whole number"),
        ([], {"imagePath": None}, r"a\.json: imagePath is None: expected the name of a picture"),
        ([], {"imagePath": "../../b.png"}, r"a\.json: imagePath is '\.\./\.\./b\.png', which leads outside"),
    ],
)
def test_a_labelme_shape_that_is_none_is_named(
    tmp_path: Path, shapes: Any, keys: dict[str, Any], message: str
):
    with pytest.raises(RecordError, match=message):
        read(labelme(tmp_path, *shapes, **keys))


def test_labelme_pictures_of_windows_and_of_other_folders(tmp_path: Path):
    labelme(tmp_path / "x", imagePath="..\\pictures\\a.png")
    [found] = read(tmp_path / "x")
    assert found.pictures == [tmp_path / "x/a.png"]  # beside the file, under its bare name
    noise(tmp_path / "y/pictures/b.png", SIZE)
    labelme(tmp_path / "y/labels", imagePath="../pictures/b.png")
    [found] = read(tmp_path / "y")
    assert found.pictures[0] is not None
    assert found.pictures[0].resolve() == tmp_path / "y/pictures/b.png"


@pytest.mark.parametrize("key", ["imageWidth", "imageHeight"])
def test_a_labelme_picture_of_infinite_size_is_named(tmp_path: Path, key: str):
    value = {"imagePath": "a.png", "imageWidth": 64, "imageHeight": 48, "shapes": [], key: "1e999"}
    write(tmp_path / "a.json", json.dumps(value))
    with pytest.raises(RecordError, match=rf"{key} is '1e999': expected a whole number of pixels"):
        read_sources(tmp_path / "a.json", ImportOptions(), format_name="labelme")


# CVAT


def cvat(folder: Path, shapes: str, image: str = 'id="0" name="a.png" width="100" height="50"') -> Path:
    noise(folder / "images/a.png", SIZE)
    write(
        folder / "annotations.xml",
        f"<annotations><version>1.1</version><image {image}>{shapes}</image></annotations>",
    )
    return folder


def test_cvat_shapes(tmp_path: Path):
    folder = cvat(
        tmp_path,
        '<box label="cat" xtl="10" ytl="20" xbr="50.5" ybr="40" occluded="0"/>'
        '<polygon label="dog" points="1.0,2.0;31,2;31,12.5"/>'
        '<box label="cat" xtl="40" ytl="20" xbr="60" ybr="30" rotation="90"/>'
        '<ellipse label="cat" cx="50" cy="25" rx="20" ry="10"/>'
        '<mask label="dog" rle="1, 2" left="5" top="6" width="7" height="8"/>'
        '<polyline label="cat" points="1,2;3,4"/><tag label="cat"/>',
    )
    [found] = read(folder)
    assert recognised(folder) == recognised(folder / "annotations.xml") == "cvat"
    boxes = [(name, tuple(np.round(box, 6))) for name, box in objects_of(found)[0]]
    assert boxes == [
        ("dog", (1, 2, 31, 12.5)), ("dog", (5, 6, 12, 14)), ("cat", (10, 20, 50.5, 40)), ("cat", (30, 15, 70, 35)),
        ("cat", (45, 15, 55, 35)),
    ]  # fmt: skip
    assert found.left_out == {"polyline_shapes_left_out": 1, "tag_shapes_left_out": 1}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            '<box label="cat" xtl="50" ytl="20" xbr="10" ybr="40"/>',
            r"a\.png: shape 1 has the box .*corners swapped\?",
        ),
        (
            '<box label="cat" xtl="x" ytl="20" xbr="10" ybr="40"/>',
            r"image 'a\.png': shape 1\.xtl is 'x': expected a number",
        ),
        ('<box label="cat" ytl="20" xbr="10" ybr="40"/>', r"shape 1\.xtl is None: expected a number"),
        (
            '<polygon label="cat" points="1,2;3,4"/>',
            r"shape 1 has a polygon of 2 points: expected at least 3",
        ),
        ('<polygon label="cat" points="1,2;3"/>', r"shape 1 has a polygon of 1\.5 points"),
        ('<box xtl="1" ytl="2" xbr="10" ybr="40"/>', r"shape 1 has the name ''"),
    ],
)
def test_a_cvat_shape_that_is_none_is_named(tmp_path: Path, shapes: str, message: str):
    with pytest.raises(RecordError, match=message):
        read(cvat(tmp_path, shapes))


def test_cvat_files_of_another_kind_are_named(tmp_path: Path):
    path = write(tmp_path / "annotations.xml", "<annotations><track id='0'/></annotations>")
    with pytest.raises(RecordError, match=r"is CVAT for video \(tracks\)\. Export the task as"):
        read(path)
    write(path, "<annotations/>")
    with pytest.raises(RecordError, match="holds no <image>"):
        read(path)
    with pytest.raises(RecordError, match=r"which leads outside of .*--allow-outside"):
        read(cvat(tmp_path, "", 'name="../../a.png" width="100" height="50"'))


# our JSONL


def test_faults_of_a_data_file_are_collected_line_by_line(tmp_path: Path):
    good = {
        "images": ["a.png"],
        "width": 100,
        "height": 50,
        "objects": [{"desc": "cat", "bbox_2d": [0, 0, 999, 500]}],
    }
    swapped = {**good, "objects": [{"desc": "cat", "bbox_2d": [9, 0, 3, 5]}]}
    text = (
        "\n".join([json.dumps(good), json.dumps(swapped), "{", "", json.dumps(good)]).encode() + b'\n"\xff"\n'
    )
    faults = Faults(collect=True)
    found = read_data_file(write(tmp_path / "d.jsonl", text), faults)
    assert [fault.split(": ", 1)[0] for fault in faults.messages] == [
        f"{tmp_path / 'd.jsonl'}:{n}" for n in (2, 3, 6)
    ]
    assert objects_of(found) == [[("cat", pytest.approx([0, 0, 99, 49 * 500 / 999]))]] * 2
    with pytest.raises(RecordError, match=r"d\.jsonl:2: object 0"):
        read_data_file(tmp_path / "d.jsonl", Faults())
