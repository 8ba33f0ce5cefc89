"""The JSONL contract: what is read, and what each breach is told."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from coordexp.codec.records import Record, iter_jsonl, order_objects, parse_record, read_jsonl
from coordexp.codec.schema import BoxObject
from coordexp.errors import ConfigError, RecordError

CAT = {"desc": "cat", "bbox_2d": [1, 2, 30, 40]}
SAIL = {"desc": "sail", "poly": [0, 0, 5, 9, 7, 2], "poly_points": 3}


def record(**changes):
    base = {"images": ["a.jpg"], "width": 640, "height": 480, "objects": [CAT]}
    return {key: value for key, value in (base | changes).items() if value is not ...}


def with_object(**changes):
    obj = {key: value for key, value in (CAT | changes).items() if value is not ...}
    return record(objects=[CAT, obj])


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_a_record_is_read_as_written():
    source = record(images=["a.jpg", "b.jpg"], objects=[CAT, SAIL], summary="a cat", metadata={"image_id": 7})
    assert parse_record(json.dumps(source), file="data/train.jsonl", line=3) == Record(
        images=("a.jpg", "b.jpg"),
        width=640,
        height=480,
        objects=(
            BoxObject("cat", "bbox_2d", (1, 2, 30, 40)),
            BoxObject("sail", "poly", (0, 0, 5, 9, 7, 2)),
        ),
        summary="a cat",
        metadata={"image_id": 7},
        file="data/train.jsonl",
        line=3,
    )


def test_classes_are_read_in_one_form_and_in_their_order():
    source = record(objects=[{**CAT, "desc": "caf\u00e9"}], classes=["zebra", " cafe\u0301 ", "ant"])
    assert parse_record(source).classes == ("zebra", "caf\u00e9", "ant")
    assert parse_record(record(objects=[], classes=["ant"])).classes == ("ant",)
    assert parse_record(record()).classes is None


def test_bins_may_be_coordinate_tokens():
    tokens = ["<|coord_1|>", 2, "<|coord_30|>", 40]
    assert parse_record(with_object(bbox_2d=tokens)).objects[1] == BoxObject("cat", "bbox_2d", (1, 2, 30, 40))


def test_descriptions_are_read_in_one_unicode_form():
    """Composed and decomposed accents look the same, and are the same description."""
    written = record(objects=[{**CAT, "desc": desc} for desc in ("caf\u00e9", "cafe\u0301")])
    assert [obj.desc for obj in parse_record(written).objects] == ["caf\u00e9"] * 2


@pytest.mark.parametrize("desc", ["\u200d\U0001f469", "\u0301", ".", "\u200b\u4e2d"])
def test_one_sign_that_can_be_read_is_a_description(desc):
    assert parse_record(with_object(desc=desc)).objects[1].desc == desc


def test_an_image_without_objects_is_a_record():
    assert parse_record(record(objects=[])).objects == ()


def test_a_flat_polygon_is_no_fault():
    """Only boxes must have extent: a polygon may have any corners."""
    assert parse_record(with_object(bbox_2d=..., poly=[5, 5, 5, 5, 5, 5])).objects[1].bins == (5,) * 6


RECORD_FAULTS = [
    ("[]", "the line holds a list, expected a JSON object"),
    ("3", "the line holds a number"),
    ('{"images": ["a.jpg"], "width"', r"not one line of JSON \(.*column \d+; the line may be truncated\)"),
    ('{"images": ["a.jpg"] "width": 3}', r"not one line of JSON \(Expecting ',' delimiter at column 22\)"),
    ('{"width": NaN}', "holds NaN, which is not JSON"),
    ('{"width": 3, "width": 4}', "key 'width' is written more than once"),
    ("[" * 100_000, "is not readable JSON"),
    (record(image="a.jpg"), r"unknown key 'image' \(did you mean 'images'\?\)"),
    (record(imgs=["a.jpg"], images=...), "unknown key 'imgs'.*known keys: images, width, height, objects"),
    (record(width=...), "key 'width' is missing; required keys: images, width, height, objects"),
    (record(objects=...), "key 'objects' is missing"),
    (record(images=[]), r"images is \[\], expected a non-empty list of paths"),
    (record(images="a.jpg"), "images is 'a.jpg', expected a non-empty list"),
    (record(images=["\udcff.jpg"]), r"images\[0\] .* holds half of a surrogate pair"),
    (record(summary="\udcff"), "summary .* holds half of a surrogate pair"),
    (record(width=2**31), "width is 2147483648, expected an int > 0"),
    (record(images=["a.jpg", ""]), r"images\[1\] is '', expected a path"),
    (record(images=[3]), r"images\[0\] is 3, expected a path"),
    (record(width=0), "width is 0, expected an int > 0"),
    (record(height=-1), "height is -1, expected an int > 0"),
    (record(width=640.0), "width is 640.0, expected an int > 0"),
    (record(height=True), "height is True, expected an int > 0"),
    (record(width="640"), "width is '640', expected an int > 0"),
    (record(objects=None), "objects is None, expected a list"),
    (record(objects={"desc": "cat"}), "objects is {'desc': 'cat'}, expected a list"),
    (record(summary=3), "summary is 3, expected text"),
    (record(classes="cat"), "classes is 'cat', expected a list of names"),
    (record(classes=[]), r"classes is \[\], expected a list of names"),
    (record(classes=["cat", 3]), r"classes\[1\] is 3, expected a name with something to read"),
    (record(classes=["cat", " "]), r"classes\[1\] is ' ', expected a name with something to read"),
    (record(classes=["cat", "\udcff"]), r"classes\[1\] .* holds half of a surrogate pair"),
    (record(classes=["cat", "dog", "cat "]), "classes names 'cat' more than once"),
    (record(metadata=[1]), r"metadata is \[1\], expected a JSON object"),
]

OBJECT_FAULTS = [
    (record(objects=[CAT, "cat"]), "is 'cat', expected a JSON object with desc and one geometry"),
    (with_object(desc=...), "desc is missing, expected a description with something to read"),
    (with_object(desc=""), "desc is '', expected a description with something to read"),
    (with_object(desc=" \t"), r"desc is ' \\t', expected a description with something to read"),
    (with_object(desc="\u00a0\u200b\u3164\ufeff"), "desc is .*, expected a description with something to read"),
    (with_object(desc="a \ud83d cat"), "desc .* holds half of a surrogate pair"),
    (with_object(desc=None), "desc is None"),
    (with_object(desc=7), "desc is 7"),
    (with_object(bbox_2d=...), "no geometry: expected exactly one of bbox_2d, poly"),
    (with_object(poly=[1, 2, 3, 4, 5, 6]), r"two geometries \(bbox_2d and poly\): keep exactly one"),
    (with_object(bbox_2d=..., bbox=[1, 2, 3, 4]), r"unknown key 'bbox' \(did you mean 'bbox_2d'\?\)"),
    (with_object(bbox_2d=..., polygon=[1, 2, 3, 4]), r"unknown key 'polygon' \(did you mean 'poly'\?\)"),
    (with_object(bbox_2d=..., line=[1, 2, 3, 4]), "unknown key 'line'.* exactly one geometry: bbox_2d"),
    (with_object(score=0.5), "unknown key 'score'"),
    (with_object(desc="cot") | {"classes": ["cat"]}, "desc 'cot' is not among the 1 classes .* mean 'cat'"),
    (with_object(bbox_2d="1, 2, 3, 4"), "bbox_2d is '1, 2, 3, 4', expected a list of bins"),
    (with_object(bbox_2d=None), "bbox_2d is None, expected a list of bins"),
    (with_object(bbox_2d=[1, 2, 3]), r"bbox_2d has 3 values, expected 4 values \(x1, y1, x2, y2\)"),
    (with_object(bbox_2d=..., poly=[1, 2, 3, 4]), "poly has 4 values, expected an even count of at least 6"),
    (with_object(bbox_2d=..., poly=[1] * 7), "poly has 7 values"),
    (with_object(bbox_2d=[1, 2, 3, 1000]), r"\[3\] is 1000, expected a bin in 0..999.*look like pixels"),
    (with_object(bbox_2d=[-1, 2, 3, 4]), r"bbox_2d\[0\] is -1, expected a bin in 0..999$"),
    (with_object(bbox_2d=[1, 2.0, 3, 4]), r"bbox_2d\[1\] is 2.0, expected an int .*never rounded\)$"),
    (with_object(bbox_2d=[1, True, 3, 4]), r"bbox_2d\[1\] is True, expected an int"),
    (with_object(bbox_2d=[1, None, 3, 4]), r"bbox_2d\[1\] is None, expected an int"),
    (with_object(bbox_2d=[0.1, 0, 1, 0.75]), r"look normalised to \[0, 1\]: .* round\(999 \* value\)"),
    (with_object(bbox_2d=[12.5, 8.0, 1201.0, 9.0]), r"pixels: .*round\(999 \* x / max\(1, width - 1\)\)"),
    (with_object(bbox_2d=["<|coord_1000|>", 2, 3, 4]), r"\[0\] is '<\|coord_1000\|>', expected an int or"),
    (with_object(bbox_2d=[1, "2", 3, 4]), r"bbox_2d\[1\] is '2', expected an int or"),
    (with_object(bbox_2d=[30, 2, 1, 40]), r"\[30, 2, 1, 40\] has x2 < x1 \(1 < 30\).*Swap the corners"),
    (with_object(bbox_2d=[1, 40, 30, 2]), r"has y2 < y1 \(2 < 40\)"),
    (with_object(bbox_2d=[5, 2, 5, 40]), r"no extent in x \(x1 = x2 = 5\), expected x1 < x2. Widen"),
    (with_object(bbox_2d=[1, 2, 30, 2]), r"no extent in y \(y1 = y2 = 2\)"),
    (with_object(poly_points=2), "poly_points stands beside bbox_2d"),
    (with_object(bbox_2d=..., poly=[1, 2, 3, 4, 5, 6], poly_points=4), "is 4, but poly has 3 points"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "message"), RECORD_FAULTS)
def test_a_faulty_record_names_file_line_and_fault(source, message):
    with pytest.raises(RecordError, match=message) as error:
        parse_record(source, file="train.jsonl", line=12)
    assert str(error.value).startswith("train.jsonl:12: ")
    assert "(0-based)" not in str(error.value)


@pytest.mark.parametrize(("source", "message"), OBJECT_FAULTS)
def test_a_faulty_object_names_file_line_index_and_fault(source, message):
    for form in (source, json.dumps(source)):
        with pytest.raises(RecordError, match=message) as error:
            parse_record(form, file="train.jsonl", line=12)
        assert str(error.value).startswith("train.jsonl:12: object 1 (0-based): ")


def test_a_key_repeated_inside_an_object_is_refused():
    line = json.dumps(record()).replace('"desc"', '"bbox_2d": [1, 2, 3, 4], "desc"')
    with pytest.raises(RecordError, match=r"train.jsonl:2: key 'bbox_2d' is written more than once"):
        parse_record(line, file="train.jsonl", line=2)


def test_a_file_is_read_line_by_line(tmp_path):
    path = write(
        tmp_path / "train.jsonl", "\ufeff" + json.dumps(record()), "", json.dumps(record(objects=[SAIL]))
    )
    records = read_jsonl(path)
    assert [(r.file, r.line, len(r.objects)) for r in records] == [(str(path), 1, 1), (str(path), 3, 1)]
    assert records == list(iter_jsonl(path))


def test_the_records_before_a_fault_are_given_first(tmp_path):
    path = write(tmp_path / "train.jsonl", json.dumps(record()), json.dumps(record())[:-9])
    records = iter_jsonl(path)
    assert next(records).line == 1
    with pytest.raises(RecordError, match=r"train\.jsonl:2: is not one line of JSON"):
        next(records)


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(record()).encode() + b'\n{"summary": "\xe9t\xe9"}\n')
    with pytest.raises(RecordError, match=r"latin\.jsonl:2: is not UTF-8 .*at byte 13"):
        read_jsonl(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RecordError, match=r"none\.jsonl: cannot be read \(No such file or directory\)"):
        read_jsonl(tmp_path / "none.jsonl")


def test_images_are_relative_to_the_data_file(tmp_path):
    (tmp_path / "images").mkdir()
    size = (record()["width"], record()["height"])
    Image.new("RGB", size).save(tmp_path / "images" / "a.jpg")
    path = write(
        tmp_path / "train.jsonl",
        json.dumps(record(images=["images/a.jpg", str(tmp_path / "images" / "a.jpg")])),
        json.dumps(record(images=["images/b.jpg"])),
    )
    assert read_jsonl(path)[0].image_paths() == (tmp_path / "images" / "a.jpg",) * 2
    with pytest.raises(RecordError) as error:
        read_jsonl(path, require_images=True)
    assert str(error.value).startswith(
        f"{path}:2: image {tmp_path / 'images' / 'b.jpg'} does not exist. Paths are relative"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: Image.new("RGB", (9, 7)).save(file), "is 9 x 7 pixels, but width and height say"),
        (lambda file: file.write_bytes(b"no image"), "cannot be read"),
    ],
)
def test_an_image_of_another_size_or_none_at_all_is_refused(tmp_path, make, message):
    make(tmp_path / "a.png")
    path = write(tmp_path / "train.jsonl", json.dumps(record(images=["a.png"])))
    with pytest.raises(RecordError, match=rf"train\.jsonl:1: image .*a\.png {message}"):
        read_jsonl(path, require_images=True)


def test_a_picture_that_the_models_processor_cannot_take_is_refused(tmp_path):
    Image.new("RGB", (2000, 6)).save(tmp_path / "a.png")
    path = write(tmp_path / "train.jsonl", json.dumps(record(images=["a.png"], width=2000, height=6)))
    with pytest.raises(
        RecordError, match=r"jsonl:1: image .*a\.png is 2000 x 6 pixels, an aspect ratio of 333"
    ):
        read_jsonl(path, require_images=True)


def test_sorted_objects_go_by_top_then_left():
    low = BoxObject("low", "bbox_2d", (0, 50, 10, 60))
    right = BoxObject("right", "bbox_2d", (40, 20, 50, 30))
    left = BoxObject("left", "poly", (30, 90, 60, 20, 10, 40))  # min y 20, min x 10
    tie = BoxObject("tie", "bbox_2d", (40, 20, 90, 90))
    assert order_objects([low, right, tie, left]) == [left, right, tie, low]


@settings(deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_random_order_is_a_permutation_fixed_by_the_seed(seed):
    objects = [BoxObject(str(n), "bbox_2d", (n, n, n + 1, n + 1)) for n in range(6)]
    shuffled = order_objects(objects, "random", seed)
    assert sorted(shuffled, key=lambda obj: obj.desc) == objects
    assert order_objects(objects, "random", seed) == shuffled


def test_random_orders_differ_between_seeds():
    objects = [BoxObject(str(n), "bbox_2d", (n, n, n + 1, n + 1)) for n in range(6)]
    assert len({tuple(order_objects(objects, "random", seed)) for seed in range(50)}) > 40


def test_unknown_ordering_is_refused():
    with pytest.raises(ConfigError, match=r"object_ordering is 'size', expected one of sorted, random"):
        order_objects([], "size")
