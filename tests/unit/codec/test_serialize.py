"""Objects -> CoordJSON -> strict JSON, and the fragment that completes a prefix."""

from __future__ import annotations

import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.codec.schema import BoxObject
from coordexp.codec.serialize import append_fragment, serialize, to_strict_json
from coordexp.errors import ConfigError, RecordError, RolloutError

CAT = BoxObject("cat", "bbox_2d", (1, 20, 300, 999))
SAIL = BoxObject("sail", "poly", (0, 0, 5, 9, 7, 2))
CAT_TEXT = '{"desc": "cat", "bbox_2d": [<|coord_1|>, <|coord_20|>, <|coord_300|>, <|coord_999|>]}'
CAT_GEOMETRY_FIRST = '{"bbox_2d": [<|coord_1|>, <|coord_20|>, <|coord_300|>, <|coord_999|>], "desc": "cat"}'
SAIL_TEXT = (
    '{"desc": "sail", "poly": [<|coord_0|>, <|coord_0|>, <|coord_5|>, <|coord_9|>, <|coord_7|>, <|coord_2|>]}'
)


@pytest.mark.parametrize(
    ("objects", "field_order", "expected"),
    [
        ([], "desc_first", '{"objects": []}'),
        ([CAT], "desc_first", f'{{"objects": [{CAT_TEXT}]}}'),
        ([CAT], "geometry_first", f'{{"objects": [{CAT_GEOMETRY_FIRST}]}}'),
        ([SAIL, CAT], "desc_first", f'{{"objects": [{SAIL_TEXT}, {CAT_TEXT}]}}'),
    ],
)
def test_serialize(objects, field_order, expected):
    assert serialize(objects, field_order) == expected


@pytest.mark.parametrize(
    ("desc", "written"),
    [
        ('a "b" \\', r'"a \"b\" \\"'),  # quotes and backslashes are escaped
        ("a\nb\t\x01", r'"a\nb\t\u0001"'),  # control characters are escaped
        ("猫 naïve 🐱", '"猫 naïve 🐱"'),  # non-ASCII is kept
        ("<|im_end|>", r'"\u003c|im_end|>"'),  # a control token stays text
        ("a <b> | c", '"a <b> | c"'),  # other angle brackets are kept
        ("a\n\u0301b\u0301", r'"a\n\u0301' + 'b\u0301"'),  # a mark never joins the letter of an escape
        ("\u001a\u0327\u0301\u732b", r'"\u001a\u0327\u0301' + '\u732b"'),
        ('"\u0301\n\U00010a0d', '"\\"\u0301' + r"\n" + '\U00010a0d"'),  # where it cannot join, it is kept
    ],
)
def test_descriptions_are_json_strings(desc, written):
    text = serialize([BoxObject(desc, "bbox_2d", (0, 0, 1, 1))])
    assert text.startswith(f'{{"objects": [{{"desc": {written}, "bbox_2d": [')
    assert json.loads(written) == desc


@pytest.mark.parametrize(
    ("desc", "form"), [("cafe\u0301", "caf\u00e9"), ("\u212b", "\u00c5"), ("\u1100\u1161", "\uac00")]
)
def test_a_description_has_one_unicode_form(desc, form):
    assert BoxObject(desc, "bbox_2d", (0, 0, 1, 1)).desc == form
    assert BoxObject(desc, "bbox_2d", (0, 0, 1, 1)) == BoxObject(form, "bbox_2d", (0, 0, 1, 1))


@settings(max_examples=500, deadline=None)
@given(
    desc=st.text(
        st.one_of(
            st.characters(exclude_categories=("Cs",)),
            st.sampled_from('\n\t\x0b\x1a"\\<|\u0301\u0327\u0338\u0344\u3099\u1161'),
        )
    ).filter(str.strip)
)
def test_text_is_in_its_normal_form_and_stays_so(desc):
    """What a tokenizer that normalizes makes of it is what was written."""
    text = serialize([BoxObject(desc, "bbox_2d", (0, 0, 1, 1))])
    assert unicodedata.normalize("NFC", text) == text
    assert json.loads(to_strict_json(text))["objects"][0]["desc"] == unicodedata.normalize("NFC", desc)


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        (BoxObject(" \t\u3000", "bbox_2d", (1, 2, 3, 4)), "expected a non-empty string"),
        (BoxObject("", "bbox_2d", (1, 2, 3, 4)), "desc '', expected a non-empty string"),
        (BoxObject("a\ud800", "bbox_2d", (1, 2, 3, 4)), "lone surrogate"),
        (BoxObject("cat", "bbox", (1, 2, 3, 4)), "kind is 'bbox', expected one of bbox_2d, poly"),
        (BoxObject("cat", "bbox_2d", (1, 2, 3, 1000)), r"bbox_2d\[3\] is 1000, expected a bin in 0..999"),
        (BoxObject("cat", "bbox_2d", (-1, 2, 3, 4)), r"bbox_2d\[0\] is -1"),
        (
            BoxObject("cat", "bbox_2d", (1, 2.0, 3, 4)),
            r"bbox_2d\[1\] is 2.0, expected an int .*never rounded",
        ),
        (BoxObject("cat", "bbox_2d", (True, 2, 3, 4)), r"bbox_2d\[0\] is True, expected an int"),
        (BoxObject("cat", "bbox_2d", (1, 2, 3)), "bbox_2d has 3 values, expected 4 values"),
        (
            BoxObject("cat", "poly", (1, 2, 3, 4, 5)),
            "poly has 5 values, expected an even count of at least 6",
        ),
        (BoxObject("cat", "poly", (1, 2, 3, 4)), "poly has 4 values"),
    ],
)
def test_what_cannot_be_written_is_refused(obj, message):
    with pytest.raises(RecordError, match=message) as error:
        serialize([CAT, obj])
    assert "object 1 (0-based" in str(error.value)


def test_unknown_field_order_is_refused():
    with pytest.raises(ConfigError, match="'desc', expected one of desc_first, geometry_first"):
        serialize([CAT], "desc")


@pytest.mark.parametrize(
    ("objects", "prefix", "expected"),
    [
        ([], '{"objects": [', "]}"),
        ([CAT], '{"objects": [', CAT_TEXT + "]}"),
        ([], f'{{"objects": [{CAT_TEXT}', "]}"),
        ([CAT, SAIL], f'{{"objects": [{CAT_TEXT}', f", {CAT_TEXT}, {SAIL_TEXT}]}}"),
        ([CAT], '\n{ "objects":[', CAT_TEXT + "]}"),
        ([CAT], '{"objects": [{"desc": "}]"}', f", {CAT_TEXT}]}}"),
        ([CAT], f'{{"objects": [1, "]", {CAT_TEXT}', f", {CAT_TEXT}]}}"),
    ],
)
def test_append_fragment(objects, prefix, expected):
    assert append_fragment(objects, prefix) == expected


def test_append_fragment_in_the_other_field_order():
    assert append_fragment([CAT], '{"objects": [', "geometry_first") == CAT_GEOMETRY_FIRST + "]}"


@pytest.mark.parametrize(
    ("prefix", "why"),
    [
        ("", "no open container"),
        ("[", "no open container"),
        ('{"objects": ', "no open container"),
        ('{"objects": []}', "already closed"),
        (f'{{"objects": [{CAT_TEXT}]}}', "already closed"),
        (f'{{"objects": [{CAT_TEXT}]', "ends in neither"),
        (f'{{"objects": [{CAT_TEXT}, ', "ends in neither"),
        (f'{{"objects": [{CAT_TEXT} ', "ends in neither"),
        ('{"objects": [{"desc": "cat", "bbox_2d": [', "ends in neither"),
        ('{"objects": [{"desc": "a}', "ends inside a record"),
        ('{"objects": [{"desc": {}', "ends inside a record"),
    ],
)
def test_a_prefix_that_is_not_append_ready_is_refused(prefix, why):
    with pytest.raises(RolloutError, match=f"not append-ready: .*{why}"):
        append_fragment([CAT], prefix)


def test_strict_json_with_ints():
    assert json.loads(to_strict_json(serialize([CAT, SAIL]) + "<|im_end|>")) == {
        "objects": [
            {"desc": "cat", "bbox_2d": [1, 20, 300, 999]},
            {"desc": "sail", "poly": [0, 0, 5, 9, 7, 2]},
        ]
    }


def test_strict_json_with_strings():
    assert json.loads(to_strict_json(serialize([CAT]), coords="strings"))["objects"][0]["bbox_2d"] == [
        "<|coord_1|>", "<|coord_20|>", "<|coord_300|>", "<|coord_999|>"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": "<|coord_1|>"}', '{"a": "<|coord_1|>"}'),  # inside a string
        ('{"a": "\\"<|coord_1|>", "b": <|coord_2|>}', '{"a": "\\"<|coord_1|>", "b": 2}'),  # escaped quote
        ("[<|coord_1000|>, <|coord_01|>]", "[<|coord_1000|>, <|coord_01|>]"),  # no coordinate tokens
        ('[<|coord_5|>, "cut <|coord_6|>', '[5, "cut <|coord_6|>'),  # a string the text ends in
    ],
)
def test_strict_json_touches_bare_coordinate_tokens_only(text, expected):
    assert to_strict_json(text) == expected


def test_unknown_coords_mode_is_refused():
    with pytest.raises(ConfigError, match="'floats', expected one of ints, strings"):
        to_strict_json("{}", coords="floats")


@settings(deadline=None)
@given(
    desc=st.text(min_size=1).filter(str.strip).map(lambda text: unicodedata.normalize("NFC", text)),
    bins=st.tuples(*[st.integers(0, 999)] * 4),
    field_order=st.sampled_from(["desc_first", "geometry_first"]),
)
def test_strict_json_of_serialized_objects_is_the_objects(desc, bins, field_order):
    text = serialize([BoxObject(desc, "bbox_2d", bins)], field_order)
    assert json.loads(to_strict_json(text)) == {"objects": [{"desc": desc, "bbox_2d": list(bins)}]}
    assert "<|" not in json.dumps(json.loads(to_strict_json(text))["objects"][0]["bbox_2d"])
    assert text.count("<|") == 4


def test_bins_become_a_tuple():
    assert BoxObject("cat", "bbox_2d", [1, 20, 300, 999]) == CAT


def test_integers_of_numpy_are_bins_too():
    bins = tuple(np.array([1, 2, 30, 40]))
    assert BoxObject("a", "bbox_2d", bins) == BoxObject("a", "bbox_2d", (1, 2, 30, 40))
    assert serialize([BoxObject("a", "bbox_2d", bins)]) == serialize(
        [BoxObject("a", "bbox_2d", (1, 2, 30, 40))]
    )
    with pytest.raises(RecordError, match="never rounded"):
        serialize([BoxObject("a", "bbox_2d", tuple(np.array([1.0, 2.0, 30.0, 40.0])))])
