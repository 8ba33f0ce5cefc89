"""COCO data sets and results as columns: what people write is read for what it means, or named with entry and key."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.coco_reference import pycocotools_directly, random_pair

from coordexp.errors import RecordError
from coordexp.eval.coco.annotations import Dataset, read_dataset, read_results
from coordexp.eval.coco.evaluate import ENGINES, evaluate_coco
from coordexp.eval.coco.external import coco_images, load_dataset, load_results
from coordexp.eval.coco.fields import EntryPlace, read_flags, read_numbers

TRIANGLE = [10.0, 20.0, 60.0, 20.0, 10.0, 90.0]


def small() -> dict[str, Any]:
    """Two images, two categories, three annotations."""
    return {
        "images": [
            {"id": 7, "width": 100, "height": 200, "file_name": "a.png"},
            {"id": 3, "width": 50, "height": 60, "file_name": "b.png"},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 2, "bbox": [1, 2, 30, 40], "area": 900, "iscrowd": 0},
            {"id": 2, "image_id": 3, "category_id": 1, "bbox": [5, 6, 7.5, 8], "area": 60, "iscrowd": 1},
            {"id": 3, "image_id": 7, "category_id": 1, "bbox": [0, 0, 10, 10]},
        ],
        "categories": [{"id": 2, "name": "cat"}, {"id": 1, "name": "dog"}],
    }


def results() -> list[dict[str, Any]]:
    return [
        {"image_id": 3, "category_id": 1, "bbox": [5, 6, 7, 8], "score": 0.5},
        {"image_id": 7, "category_id": 2, "bbox": [1, 2, 30, 40], "score": 1},
    ]


def changed(index: int = 0, part: str = "annotations", **values: Any) -> dict[str, Any]:
    gt = small()
    gt[part][index].update(values)
    return gt


def test_columns_hold_what_the_file_says():
    dataset = read_dataset(small())
    assert (dataset.image_ids, dataset.category_ids) == ([7, 3], [2, 1])
    assert (dataset.file_names, dataset.category_names) == (["a.png", "b.png"], ["cat", "dog"])
    assert dataset.sizes_N2.tolist() == [[100, 200], [50, 60]]
    assert (dataset.image_M.tolist(), dataset.category_M.tolist()) == ([0, 1, 0], [0, 1, 1])
    assert dataset.boxes_xywh_M4.tolist() == [[1, 2, 30, 40], [5, 6, 7.5, 8], [0, 0, 10, 10]]
    assert dataset.area_M.tolist() == [900, 60, 100]  # the last is that of its box
    assert dataset.crowd_M.tolist() == [False, True, False]
    assert (dataset.image_rank_N.tolist(), dataset.names_by_rank()) == ([1, 0], ["dog", "cat"])
    found = read_results(results(), dataset)
    assert (found.image_M.tolist(), found.category_M.tolist()) == ([1, 0], [1, 0])
    assert (found.score_M.tolist(), found.has_boxes) == ([0.5, 1.0], True)


def test_the_way_back_to_coco_keeps_ids_and_gives_every_value_its_type():
    gt = changed(0, area="900", bbox=["1", 2, "3e1", 40], iscrowd="no")
    gt["annotations"][1]["id"] = 1  # twice: written ids count from 1
    gt["images"][0] |= {"coco_url": "http://x/a.png", "neg_category_ids": [1], "license": {"deep": [[]]}}
    dataset = read_dataset(gt)
    written = dataset.as_coco()
    expected = small()
    expected["annotations"][2] |= {"area": 100.0, "iscrowd": 0}
    expected["images"][0] |= {"coco_url": "http://x/a.png", "neg_category_ids": [1]}
    assert written == expected
    assert read_results(results(), dataset).as_coco() == results()


ABSENT = [None, "absent"]


@pytest.mark.parametrize("value", [*ABSENT, "30", 30, 30.0, " 30 ", "3e1", "30.", np.float32(30)])
def test_an_area_is_read_or_is_that_of_the_box(value: Any):
    gt = changed(0, area=value)
    if value == "absent":
        del gt["annotations"][0]["area"]
    expected = 1200.0 if value in ABSENT else 30.0
    assert read_dataset(gt).area_M.tolist() == [expected, 60.0, 100.0]


NOT_NUMBERS = [
    "", "30px", "1,5", "1_000", "0x10", "nan", "inf", "-inf", "٣", "1e999", True, False, [], {}, [30], {"v": 1},
    math.nan, math.inf, -math.inf, 10**400, "9" * 70,
]  # fmt: skip


@pytest.mark.parametrize("value", [*NOT_NUMBERS, -1])
def test_an_area_that_is_no_number_is_named(value: Any):
    with pytest.raises(RecordError, match=r"^annotations\[0\]\.area \(id 1\) is .*: expected an area"):
        read_dataset(changed(0, area=value))


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 2e9])
@pytest.mark.parametrize("position", [0, 3])
def test_a_box_value_that_is_no_number_is_named(value: Any, position: int):
    box: list[Any] = [1, 2, 30, 40]
    box[position] = value
    with pytest.raises(RecordError, match=r"^annotations\[2\]\.bbox \(id 3\) is \[.*\]: expected 4 finite"):
        read_dataset(changed(2, bbox=box))


@pytest.mark.parametrize(
    "box", [None, [], [1, 2, 3], [1, 2, 3, 4, 5], "1,2,3,4", 5, {"x": 1}, [[1, 2], [3, 4]], [1, 2, -3, 4]]
)
def test_a_box_of_another_form_is_named(box: Any):
    with pytest.raises(
        RecordError,
        match=r"^annotations\[0\](\.bbox \(id 1\) is| \(id 1\) has no bbox) .*: expected 4 finite pixel values",
    ):
        read_dataset(changed(0, bbox=box))


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_a_score_that_is_no_number_is_named(value: Any):
    preds = results()
    preds[1]["score"] = value
    with pytest.raises(RecordError, match=r"^preds\[1\]\.score is .*: expected a finite number$"):
        read_results(preds, read_dataset(small()))


@pytest.mark.parametrize(
    ("spelling", "flag"),
    [
        *[(no, 0) for no in (None, 0, False, "0", "false", "", "no", 0.0, "null", "n", " 0.0 ")],
        *[(yes, 1) for yes in (1, True, "1", "True", "YES", 1.0, " 1 ", "y", np.int64(1))],
    ],
)
def test_any_spelling_of_a_flag(spelling: Any, flag: int):
    place = EntryPlace("annotations", [{}, {}])
    assert read_flags([spelling, 0], place, "iscrowd").tolist() == [bool(flag), False]


@pytest.mark.parametrize("value", [2, -1, 0.5, "maybe", "2", [], [1], {}, math.nan, 10**400])
def test_a_flag_that_is_neither_is_named(value: Any):
    with pytest.raises(RecordError, match=r"^annotations\[1\]\.iscrowd \(id 2\) is .*: expected 0 or 1$"):
        read_dataset(changed(1, iscrowd=value))


@pytest.mark.parametrize("key", ["width", "height"])
@pytest.mark.parametrize("value", [0, -3, 2.5, "wide", math.nan, 10**30, True, [3]])
def test_a_size_is_a_whole_number_of_pixels_or_absent(key: str, value: Any):
    with pytest.raises(
        RecordError, match=rf"^images\[1\]\.{key} \(id 3\) is .*: expected a whole number of pixels$"
    ):
        read_dataset(changed(1, "images", **{key: value}))
    sizes = read_dataset(changed(1, "images", **{key: None})).sizes_N2
    assert sizes[1].tolist() == ([0, 60] if key == "width" else [50, 0])
    assert read_dataset(changed(1, "images", **{key: "44"})).sizes_N2[1, int(key == "height")] == 44


RENAMINGS = {
    "zero": lambda i: i,
    "negative": lambda i: i - 1000,
    "64 bit": lambda i: 2**63 + i,
    "near 2^53": lambda i: 2**53 - 5 + i,
    "more than 64 bit": lambda i: 10**40 + i,
    "floats": lambda i: float(i),
    "text": lambda i: f"frame_{i:05}.jpg",
    "text of digits": lambda i: f"{i:05}",
    "other letters": lambda i: f"照片-{i:05}-é",
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", RENAMINGS)
def test_ids_of_any_kind_give_the_same_numbers(kind: str, engine: str):
    gt, preds = random_pair(30, seed=3)
    expected = pycocotools_directly(gt, preds)
    rename = RENAMINGS[kind]
    for image in gt["images"]:
        image["id"] = rename(image["id"])
    for category in gt["categories"]:
        category["id"] = rename(category["id"])
    for entry in [*gt["annotations"], *preds]:
        entry |= {"image_id": rename(entry["image_id"]), "category_id": rename(entry["category_id"])}
    for index, annotation in enumerate(gt["annotations"]):
        annotation["id"] = [0, "x", None, index, 7, 2**70][index % 6]
    found = evaluate_coco(gt, preds, engine=engine)
    np.testing.assert_allclose(list(found.values()), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("gt_id", "pred_id", "message"),
    [
        ("1", 1, r"preds\[0\]\.image_id is 1, .*: it is a number, while those are text \(such as '1'\)"),
        (1, "1", r"preds\[0\]\.image_id is '1', .*: it is text, while those are numbers \(such as 1\)"),
        (1, 2, r"preds\[0\]\.image_id is 2, not one of the 1 images of the ground truth$"),
        (1, [1], r"preds\[0\]\.image_id is \[1\]: expected an id of images.*, a whole number or text"),
        (1, 1.5, r"preds\[0\]\.image_id is 1\.5: expected an id"),
        (1, True, r"preds\[0\]\.image_id is True: expected an id"),
        (1, None, r"preds\[0\] has no image_id \(it has .*\): expected an id"),
        (1, math.nan, r"preds\[0\]\.image_id is nan: expected an id"),
        (1, "\ud800", r"preds\[0\]\.image_id is .*: expected an id"),
        (1, 10**4000, r"preds\[0\]\.image_id is a number of some 4000 digits: expected an id"),
    ],
)
def test_an_id_that_is_not_there_is_named_with_the_reason(gt_id: Any, pred_id: Any, message: str):
    gt = {"images": [{"id": gt_id}], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    preds = [{"image_id": pred_id, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}]
    with pytest.raises(RecordError, match=message):
        read_results(preds, read_dataset(gt))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda gt: gt.pop("images"), r"^gt: has no images: expected a COCO data set"),
        (lambda gt: gt.update(images=None), r"^gt: images is None: expected a list"),
        (lambda gt: gt.update(annotations={"1": {}}), r"^gt: annotations is \{.*\}: expected a list"),
        (lambda gt: gt["annotations"].insert(1, 5), r"^gt: annotations\[1\] is 5: expected an object"),
        (lambda gt: gt["images"][1].pop("id"), r"^gt: images\[1\] has no id \(it has .*\): expected the image's id"),
        (lambda gt: gt["images"][1].update(id=7), r"^gt: images\[1\] repeats id 7: ids must be unique"),
        (lambda gt: gt["categories"][1].update(id="2", name=None), r"categories\[1\] \(id '2'\) has no name"),
        (lambda gt: gt["categories"][1].update(name="  "), r"^gt: categories\[1\] \(id 1\) has no name"),
        (lambda gt: gt["categories"][1].update(name=["cat"]), r"^gt: categories\[1\]\.name \(id 1\) is \['cat'\]"),
        (lambda gt: gt["categories"][1].update(name=" cat"), r"categories\[1\] and \[0\] are both named 'cat'"),
        (lambda gt: gt["images"][0].update(file_name=["a"]), r"^gt: images\[0\]\.file_name \(id 7\) is \['a'\]"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_together_are_named(change: Any, message: str):
    gt = small()
    if "'2'" in message:  # categories of mixed ids
        gt["annotations"] = []
    change(gt)
    with pytest.raises(RecordError, match=message):
        read_dataset(gt, prefix="gt: ")


def test_names_have_one_unicode_form_and_numbers_are_names():
    gt = changed(0, "categories", name="cafe\u0301 ")
    gt["categories"][1]["name"] = 5
    assert read_dataset(gt).category_names == ["caf\u00e9", "5"]
    gt["categories"][1]["name"] = "caf\u00e9"
    with pytest.raises(RecordError, match="are both named"):
        read_dataset(gt)


def test_a_box_that_is_not_there_is_that_of_the_outline():
    gt = changed(0, bbox=None, segmentation=[TRIANGLE], area=None)
    dataset = read_dataset(gt)
    assert dataset.boxes_xywh_M4[0].tolist() == [10, 20, 50, 70]
    preds = [{"image_id": 7, "category_id": 2, "segmentation": [TRIANGLE], "score": 1}, results()[0]]
    found = read_results(preds, dataset)
    assert (found.boxes_xywh_M4[0].tolist(), found.has_boxes) == ([10, 20, 50, 70], False)
    outside = changed(0, bbox=[], segmentation=[[-50, 20, 60, 20, 60, 90, -50, 90]])
    assert read_dataset(outside).boxes_xywh_M4[0].tolist() == [0, 20, 60, 70]  # cut to the picture


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (small(), r"is a COCO data set \(images, annotations, categories\): expected a list of results"),
        ({"predictions": results()}, r'holds a list of 2 entries as "predictions" \(give that list alone\)'),
        ({"annotations": results(), "info": {}}, r'holds a list of 2 entries as "annotations"'),
        (results()[0], r"is one result, not in a list"),
        ({"a": 1}, r"is an object with the keys \['a'\]"),
        ([results()], r"is a list that holds \["),
        ([1, 2], r"is a list that holds 1: expected a list of results"),
        (None, r"is None: expected a list of results"),
        ("x" * 1000, r"is 'x+\.\.\.x+': expected a list of results"),
    ],
)
def test_what_is_no_list_of_results_is_recognised(value: Any, message: str):
    with pytest.raises(RecordError, match=message):
        read_results(value, read_dataset(small()))


def test_results_given_as_ground_truth_are_recognised():
    with pytest.raises(RecordError, match=r"^is a list of results: expected a COCO data set"):
        read_dataset(results())


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def loaded(folder: Path, gt: str, preds: str = "[]") -> tuple[Dataset, Any]:
    gt_path, pred_path = write(folder / "gt.json", gt), write(folder / "preds.json", preds)
    dataset = load_dataset(gt_path)
    return dataset, load_results(pred_path, dataset, dataset_path=gt_path)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path):
    dataset, found = loaded(tmp_path, "\ufeff" + json.dumps(small()), "\ufeff" + json.dumps(results()))
    assert (len(dataset), len(found)) == (3, 2)


@pytest.mark.parametrize(
    ("preds", "message"),
    [
        ("\n".join(map(json.dumps, results())), r"preds\.json: is JSON Lines .*expected one JSON value"),
        ("\ufeff\n" + "\n\n".join(map(json.dumps, results())) + "\n", r"preds\.json: is JSON Lines"),
        (json.dumps(results()).replace("0.5", "NaN"), r"preds\.json: preds\[0\]\.score is nan: expected"),
        (json.dumps(results()).replace("0.5", "1e400"), r"preds\.json: preds\[0\]\.score is inf: expected"),
        (json.dumps(results()).replace("0.5", "9" * 5000), r"preds\.json: not valid JSON .*5000 digits"),
        (json.dumps(results()).replace("0.5", "9" * 400), r"preds\[0\]\.score is a number of some 400 digits"),
        ("[" * 100_000, r"preds\.json: is nested too deeply"),
        ('{"a":' * 100_000, r"preds\.json: is nested too deeply"),
        ("[" * 900 + "]" * 900, r"preds\.json: is a list that holds \[+\.\.\.\]+: expected"),
        (json.dumps(results())[:-9], r"preds\.json:1: not valid JSON"),
        ("", r"preds\.json:1: not valid JSON"),
        (json.dumps(results()).replace("3", "4", 1),
         r"preds\[0\]\.image_id is 4, not one of the 2 images of .*gt\.json"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read_are_named(tmp_path: Path, preds: str, message: str):
    with pytest.raises(RecordError, match=message) as caught:
        loaded(tmp_path, json.dumps(small()), preds)
    assert len(str(caught.value)) < 500


def test_images_for_tables_hold_their_objects():
    dataset = read_dataset(small())
    first, second = coco_images(dataset, read_results(results(), dataset))
    assert (first.image_id, first.file_name, first.width, first.height) == (7, "a.png", 100, 200)
    assert first.gt.rows(scored=False) == [
        {"type": "bbox_2d", "points": [1, 2, 31, 42], "desc": "cat"},
        {"type": "bbox_2d", "points": [0, 0, 10, 10], "desc": "dog"},
    ]
    assert second.gt.rows(scored=False) == [
        {"type": "bbox_2d", "points": [5, 6, 12.5, 14], "desc": "dog", "crowd": True}
    ]
    assert second.pred.rows(scored=True) == [
        {"type": "bbox_2d", "points": [5, 6, 12, 14], "desc": "dog", "score": 0.5}
    ]


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-(10**20), 10**20) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(json_values, max_size=6))
def test_a_column_read_at_once_is_the_column_read_one_by_one(values: list[Any]):
    place = EntryPlace("annotations", [{}] * len(values))

    def read(some: list[Any]) -> list[float] | str:
        try:
            return [str(v) for v in read_numbers(some, place, "area", "a number")]
        except RecordError as error:
            return str(error)

    alone = [read([value]) for value in values]
    faults = [index for index, found in enumerate(alone) if isinstance(found, str)]
    together = read(copy.deepcopy(values))
    if faults:
        assert isinstance(together, str)
        assert together.startswith(f"annotations[{faults[0]}].area is ")
    else:
        assert together == [value for found in alone for value in found]


def test_further_keys_are_written_back_as_far_as_a_file_can_hold_them():
    gt = {
        "images": [
            {
                "id": 1,
                "neg_category_ids": [-(2**70)],
                "license": 3,
                "note": "\ud800",
                "\ud800": 1,
                "tags": ["a", "\udfff"],
            }
        ],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [],
    }
    assert read_dataset(gt).as_coco()["images"] == [
        {
            "id": 1,
            "width": None,
            "height": None,
            "file_name": "",
            "neg_category_ids": [-(2**70)],
            "license": 3,
        }
    ]


@pytest.mark.parametrize(
    ("key", "written"),
    [("iscrowd", "isCrowd"), ("iscrowd", "is_crowd"), ("bbox", "BBox"), ("image_id", "imageId")],
)
def test_a_key_in_another_spelling_is_named_and_not_read_as_absent(key: str, written: str):
    gt = changed(0)
    gt["annotations"][0] = {written if name == key else name: v for name, v in gt["annotations"][0].items()}
    with pytest.raises(
        RecordError, match=rf"^annotations\[0\] \(id 1\) has '{written}': expected the key {key}$"
    ):
        read_dataset(gt)
    both = changed(0, **{written: "anything"})  # a tool's own key beside ours
    assert len(read_dataset(both)) == len(both["annotations"])


def test_what_lacks_a_key_is_shown_with_those_it_has():
    dataset = read_dataset(changed(0))
    result = {"image_id": 7, "category_id": 1, "score": 0.5, "box": [1, 2, 3, 4]}
    with pytest.raises(
        RecordError, match=r"preds\[0\] has no bbox \(it has image_id, category_id, score, box\)"
    ):
        read_results([result], dataset)
    with pytest.raises(RecordError, match=r"preds\[0\] has no score \(it has .*confidence\)"):
        read_results([{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], "confidence": 0.5}], dataset)
