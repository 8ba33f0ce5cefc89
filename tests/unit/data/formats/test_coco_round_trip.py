"""COCO annotations -> JSONL -> COCO annotations: half a bin, everything accounted for, faults named."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from coordexp.cli.main import main
from coordexp.codec.records import read_jsonl
from coordexp.data.formats.convert import widened_bins
from coordexp.data.formats.exports.coco import export_coco
from coordexp.data.formats.options import ImportOptions
from coordexp.data.formats.readers.coco import import_coco
from coordexp.errors import ConfigError, RecordError

REAL = Path(__file__).parents[3] / "fixtures" / "coco_val2014_100" / "instances_val2014_100.json"


def dataset(*boxes, width=200, height=100, **more) -> dict:
    """One image with boxes xywh of category 7 ("cat")."""
    return {
        "images": [{"id": 12, "file_name": "a/b.png", "width": width, "height": height}],
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": [
            {"id": 100 + i, "image_id": 12, "category_id": 7, "bbox": list(box), "iscrowd": 0, **more}
            for i, box in enumerate(boxes)
        ],
    }


def write(path: Path, value) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def convert(folder: Path, value, **options):
    """(records, counts) of a data set."""
    converted = import_coco(write(folder / "in.json", value), folder / "out.jsonl", ImportOptions(**options))
    return read_jsonl(folder / "out.jsonl"), converted.counts


def corners(box_xywh) -> list[float]:
    x, y, width, height = box_xywh
    return [x, y, x + width, y + height]


def assert_half_a_bin(before: dict, after: dict) -> int:
    """Every corner, clamped to the frame of pixel centres, is within half a bin; returns how many boxes were seen."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in before["images"]}
    left = {(a["image_id"], a["category_id"]): [] for a in after["annotations"]}
    for annotation in after["annotations"]:
        left[annotation["image_id"], annotation["category_id"]].append(corners(annotation["bbox"]))
    seen = 0
    for annotation in before["annotations"]:
        if annotation["iscrowd"]:
            continue
        spans = [side - 1 for side in sizes[annotation["image_id"]]] * 2
        wanted = [min(max(v, 0), span) for v, span in zip(corners(annotation["bbox"]), spans, strict=True)]
        candidates = left[annotation["image_id"], annotation["category_id"]]
        match = [
            box
            for box in candidates
            if all(abs(b - w) <= span / 999 / 2 + 1e-9 for b, w, span in zip(box, wanted, spans, strict=True))
        ]
        assert match, (annotation, candidates)
        candidates.remove(match[0])
        seen += 1
    return seen


def test_the_real_annotations_come_back_within_half_a_bin(tmp_path: Path):
    counts, findings = import_coco(REAL, tmp_path / "val.jsonl", ImportOptions())
    assert [(finding.level, finding.kind, finding.count) for finding in findings] == [
        ("warning", "boxes_of_two_names", 2)
    ]
    export_coco(tmp_path / "val.jsonl", tmp_path / "back.json", categories=REAL)
    before, after = json.loads(REAL.read_text()), json.loads((tmp_path / "back.json").read_text())
    assert counts["crowd_left_out"] == sum(a["iscrowd"] for a in before["annotations"]) == 9
    assert (counts["degenerate_left_out"], counts["boxes_widened"]) == (0, 0)
    reaching_out = [
        a
        for image in before["images"]
        for a in before["annotations"]
        if a["image_id"] == image["id"] and not a["iscrowd"]
        and (corners(a["bbox"])[2] > image["width"] - 1 or corners(a["bbox"])[3] > image["height"] - 1)
    ]  # fmt: skip
    assert counts["boxes_clamped"] == len(reaching_out) == 70
    assert assert_half_a_bin(before, after) == len(after["annotations"]) == 830
    assert after["categories"] == before["categories"]
    assert [(i["id"], i["file_name"]) for i in after["images"]] == [
        (i["id"], i["file_name"]) for i in before["images"]
    ]


boxes_xywh = st.tuples(st.floats(0, 190), st.floats(0, 90), st.floats(1.2, 200), st.floats(1.2, 100)).map(
    lambda b: (b[0], b[1], min(b[2], 199 - b[0]), min(b[3], 99 - b[1]))
)


@settings(max_examples=60, deadline=None)
@given(st.lists(boxes_xywh, max_size=6))
def test_boxes_inside_the_frame_come_back_within_half_a_bin(boxes):
    with tempfile.TemporaryDirectory() as folder:
        before = dataset(*boxes)
        records, counts = convert(Path(folder), before)
        assert counts["boxes_clamped"] == counts["boxes_widened"] == 0
        keys = [(obj.bins[1], obj.bins[0]) for obj in records[0].objects]
        assert keys == sorted(keys)
        export_coco(
            Path(folder) / "out.jsonl", Path(folder) / "back.json", categories=Path(folder) / "in.json"
        )
        after = json.loads((Path(folder) / "back.json").read_text())
        assert assert_half_a_bin(before, after) == len(boxes)


@settings(max_examples=200, deadline=None)
@given(st.floats(-5, 205), st.floats(0.001, 0.6), st.sampled_from([1, 2, 50, 200, 1000]))
def test_a_collapsed_side_gets_exactly_one_bin_and_stays_near(left, side, width):
    boxes = np.array([[left, 3.0, left + side, 60.0]])
    found, was_widened = widened_bins(boxes, np.array([[width, 100]]))
    [bins], [widened] = found.tolist(), was_widened.tolist()
    assert 0 <= bins[0] < bins[2] <= 999
    span = max(1, width - 1)
    exact = [min(max(999 * x / span, 0), 999) for x in (left, left + side)]
    assert widened == (round(exact[0]) == round(exact[1]))
    assert abs(bins[0] - exact[0]) <= 1.0 + 1e-9
    assert abs(bins[2] - exact[1]) <= 1.0 + 1e-9
    if widened:
        assert bins[2] - bins[0] == 1


def test_everything_left_out_or_changed_is_counted(tmp_path: Path):
    source = dataset(
        (10, 10, 50, 50),
        (20, 5, 0, 9),  # no width
        (500, 5, 9, 9),  # outside
        (190, 90, 30, 30),  # reaches out: clamped
        (50.0, 50.0, 0.01, 20),  # thinner than a bin: widened
    )
    source["annotations"].append({**source["annotations"][0], "id": 7, "iscrowd": 1})
    source["images"].append({"id": 13, "file_name": "empty.png", "width": 10, "height": 10})
    records, counts = convert(tmp_path, source)
    assert counts == {
        "images_read": 2, "images_written": 2, "images_without_objects": 1, "annotations_read": 6,
        "objects_written": 3, "crowd_left_out": 1, "degenerate_left_out": 2, "boxes_widened": 1, "boxes_clamped": 1,
    }  # fmt: skip
    assert [obj.bins for obj in records[0].objects] == [
        (50, 101, 301, 605),
        (251, 505, 252, 706),
        (954, 908, 999, 999),
    ]
    assert records[0].metadata == {"image_id": 12, "file_name": "a/b.png"}
    assert len(convert(tmp_path, source, drop_empty=True)[0]) == 1
    named = convert(tmp_path, source, dataset="coco")[0]
    assert named[0].metadata == {"image_id": 12, "file_name": "a/b.png", "dataset": "coco"}


@pytest.mark.parametrize("over_max", ["drop-image", "keep-largest"])
def test_images_of_too_many_objects(tmp_path: Path, over_max):
    source = dataset((0, 0, 10, 10), (0, 20, 30, 30), (50, 50, 20, 20), (199, 3, 30, 0.01))
    source["images"].append({"id": 13, "file_name": "one.png", "width": 100, "height": 100})
    source["annotations"].append({**source["annotations"][0], "id": 7, "image_id": 13})
    records, counts = convert(tmp_path, source, max_objects=2, over_max=over_max)
    if over_max == "drop-image":
        assert [record.images for record in records] == [("one.png",)]
        assert (counts["objects_over_max_left_out"], counts["images_over_max_objects"]) == (4, 1)
    else:
        kept = [obj.bins for obj in records[0].objects]
        assert kept == [(0, 202, 151, 505), (251, 505, 351, 706)]
        assert (counts["objects_over_max_left_out"], counts["images_over_max_objects"]) == (2, 0)
    assert counts["boxes_widened"] == counts["boxes_clamped"] == 0  # counted of what is written only
    left_out = counts["objects_over_max_left_out"] + counts["crowd_left_out"] + counts["degenerate_left_out"]
    assert counts["annotations_read"] == counts["objects_written"] + left_out


def test_outlines_become_polygons_where_they_can(tmp_path: Path):
    triangle = [0, 0, 199, 0, 199.0, 0.01, 0, 99]  # the third point falls on the second
    run_lengths = {"counts": [1], "size": [1, 1]}
    outlines = [[triangle], [triangle, triangle], run_lengths, [[5, 5, 5, 5, 9, 9]], None, [], [[]]]
    source = dataset(*[(10, 10, 50, 50)] * len(outlines))
    for annotation, outline in zip(source["annotations"], outlines, strict=True):
        annotation["segmentation"] = outline
    records, counts = convert(tmp_path, source, polygons=True)
    assert [obj.kind for obj in records[0].objects].count("poly") == counts["polygons_written"] == 1
    assert records[0].objects[0].bins == (0, 0, 999, 0, 0, 999)
    assert counts["outlines_of_several_parts_as_box"] == 2
    assert (counts["outlines_degenerate_as_box"], counts["outlines_missing_as_box"]) == (1, 3)
    few_points = convert(tmp_path, source, polygons=True, max_poly_points=2)[1]
    assert (few_points["polygons_written"], few_points["outlines_over_max_points_as_box"]) == (0, 1)
    convert(tmp_path, source, polygons=True)
    export_coco(tmp_path / "out.jsonl", tmp_path / "back.json")
    back = json.loads((tmp_path / "back.json").read_text())["annotations"]
    assert back[0]["segmentation"] == [pytest.approx([0, 0, 199, 0, 0, 99])]
    assert back[0]["area"] == pytest.approx(199 * 99 / 2)


def test_flags_of_any_spelling_and_values_as_text(tmp_path: Path):
    source = dataset(*[(10 + i, "10", 50, "5e1") for i in range(6)])
    for annotation, flag in zip(source["annotations"], ("0", "1", None, True, "no", False), strict=True):
        annotation["iscrowd"] = flag
    records, counts = convert(tmp_path, source)
    assert (len(records[0].objects), counts["crowd_left_out"]) == (4, 2)
    source["annotations"][2]["iscrowd"] = "perhaps"
    with pytest.raises(
        RecordError, match=r"annotations\[2\]\.iscrowd \(id 102\) is 'perhaps': expected 0 or 1"
    ):
        convert(tmp_path, source)


@pytest.mark.parametrize("ids", [("a.png", "b.png"), (0, 2**63), (1.0, 2.0)])
def test_ids_of_any_kind_come_back(tmp_path: Path, ids):
    source = dataset((10, 10, 50, 50))
    source["images"] = [
        {**source["images"][0], "id": image_id, "file_name": f"{n}.png"} for n, image_id in enumerate(ids)
    ]
    source["annotations"][0] |= {"image_id": ids[1], "id": 0}
    records, _ = convert(tmp_path, source)
    assert [record.metadata["image_id"] for record in records] == list(ids)
    export_coco(tmp_path / "out.jsonl", tmp_path / "back.json")
    back = json.loads((tmp_path / "back.json").read_text())
    assert [image["id"] for image in back["images"]] == list(ids)
    assert back["annotations"][0]["image_id"] == ids[1]


def test_an_outline_that_leaves_the_picture_is_cut_at_its_border(tmp_path: Path):
    source = dataset((0, 0, 100, 99), segmentation=[[-1e6, 0, 100, 0, 100, 99, -1e6, 99]])
    records, counts = convert(tmp_path, source, polygons=True)
    assert counts["outlines_cut_at_the_border"] == 1
    xs, ys = records[0].objects[0].bins[0::2], records[0].objects[0].bins[1::2]
    assert (min(xs), max(xs), min(ys), max(ys)) == (0, 502, 0, 999)  # 100 of 199 pixels, all of the height


def test_images_are_checked_and_named_relative_to_the_data_file(tmp_path: Path):
    folder = tmp_path / "pictures"
    (folder / "a").mkdir(parents=True)
    source = dataset((10, 10, 50, 50))
    with pytest.raises(RecordError, match=r"in\.json: image a/b\.png \(id 12\) is not in .*pictures"):
        convert(tmp_path, source, image_root=folder)
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(RecordError, match=r"no image is left to write.*images missing 1"):
        convert(tmp_path, source, image_root=folder, missing="skip")
    records, counts = convert(tmp_path, source, image_root=folder, missing="keep")
    assert (records[0].images, counts["images_missing"]) == (("pictures/a/b.png",), 1)
    Image.new("RGB", (200, 100)).save(folder / "a" / "b.png")
    records, counts = convert(tmp_path, source, image_root=folder)
    assert read_jsonl(tmp_path / "out.jsonl", require_images=True) == records
    Image.new("RGB", (100, 200)).save(folder / "a" / "b.png")
    with pytest.raises(RecordError, match=r"is 100 x 200 pixels, but the annotations are for 200 x 100"):
        convert(tmp_path, source, image_root=folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("categories"), "has no categories"),
        (lambda d: d["annotations"][1].pop("bbox"), r"annotations\[1\] \(id 101\) has no bbox \(it has "),
        (
            lambda d: d["annotations"][1].update(bbox=[1, 2, 3]),
            r"annotations\[1\]\.bbox \(id 101\) is \[1, 2, 3\]",
        ),
        (lambda d: d["annotations"][1].update(bbox=[1, 2, 3, float("nan")]), r"annotations\[1\].*nan"),
        (lambda d: d["annotations"][1].update(image_id=1), r"annotations\[1\]\.image_id \(id 101\) is 1"),
        (
            lambda d: d["annotations"][1].update(category_id=1),
            r"annotations\[1\]\.category_id \(id 101\) is 1",
        ),
        (lambda d: d["images"].append(d["images"][0]), r"images\[1\] repeats id 12"),
        (lambda d: d["images"][0].update(width=0), r"images\[0\]\.width \(id 12\) is 0"),
        (lambda d: d["images"][0].pop("file_name"), r"images\[0\] \(id 12\) has no file_name.*from-lvis"),
        (lambda d: d["categories"][0].update(name=" "), r"categories\[0\] \(id 7\) has no name"),
    ],
)
def test_faults_are_named_with_file_and_entry(tmp_path: Path, change, message):
    source = dataset((10, 10, 50, 50), (20, 20, 50, 50))
    change(source)
    with pytest.raises(RecordError, match=rf"in\.json: .*{message}"):
        convert(tmp_path, source)
    assert not (tmp_path / "out.jsonl").exists()


def test_export_without_kept_ids_counts_from_1_and_unknown_descriptions_are_named(tmp_path: Path):
    line = {
        "images": ["x.png"],
        "width": 11,
        "height": 11,
        "objects": [{"desc": "owl", "bbox_2d": [0, 0, 999, 999]}],
    }
    (tmp_path / "d.jsonl").write_text(
        json.dumps(line) + "\n" + json.dumps({**line, "images": ["y.png"]}) + "\n"
    )
    counts = export_coco(tmp_path / "d.jsonl", tmp_path / "d.json")
    made = json.loads((tmp_path / "d.json").read_text())
    assert (counts["images_written"], counts["objects_written"], counts["categories_written"]) == (2, 2, 1)
    assert [(image["id"], image["file_name"]) for image in made["images"]] == [(1, "x.png"), (2, "y.png")]
    assert made["annotations"][0]["bbox"] == [0, 0, 10, 10]
    with pytest.raises(
        RecordError, match=r"d\.jsonl: description 'owl' \(of 1 such\) is no category of .*instances"
    ):
        export_coco(tmp_path / "d.jsonl", tmp_path / "d.json", categories=REAL)


def test_options_are_checked(tmp_path: Path):
    for options in ({"missing": "ignore"}, {"over_max": "cut"}, {"image_root": tmp_path / "none"}):
        with pytest.raises(ConfigError):
            ImportOptions(**options)


def test_the_commands_print_their_counts(tmp_path: Path, capsys):
    argv = ["data", "from-coco", "--annotations", REAL, "--output", tmp_path / "d.jsonl", "--max-objects", 20]
    assert main([str(item) for item in argv]) == 0
    printed = capsys.readouterr().out
    for row in ("crowd left out", "degenerate left out", "objects over max left out"):
        assert row in printed
    argv = ["data", "to-coco", "--data", tmp_path / "d.jsonl", "--output", tmp_path / "d.json"]
    assert main([str(item) for item in argv]) == 0
    assert (
        main(["data", "from-coco", "--annotations", "none.json", "--output", str(tmp_path / "e.jsonl")]) == 2
    )
    assert "none.json: cannot be read" in capsys.readouterr().err
