"""The compact form: a line for a name, four coordinate tokens for each of its boxes."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.codec.forms.choose import form_of
from coordexp.codec.schema import BoxObject
from coordexp.codec.token_types import TokenType
from coordexp.errors import RecordError, RolloutError
from coordexp.models.tiny_tokenizer import train_tiny_tokenizer

FORM = form_of("compact")
A, B, C = ((10, 20, 30, 40), (1, 2, 3, 4), (0, 0, 999, 999))


def tokens_of(*boxes):
    return "".join(f"<|coord_{k}|>" for box in boxes for k in box)


def box(desc, bins=A):
    return BoxObject(desc, "bbox_2d", bins)


def read(tok, text):
    return FORM.parse(tok.encode(text, add_special_tokens=False), tok)


def boxes_of(found):
    return [obj.as_box() for obj in found.objects]


def test_objects_of_one_name_that_follow_one_another_share_it(tok):
    objects = [box("cat"), box("cat", B), box("dog"), box("cat", C)]
    text = f"[\ncat{tokens_of(A, B)}\ndog{tokens_of(A)}\ncat{tokens_of(C)}]"
    assert FORM.serialize(objects) == text
    found = read(tok, text + "<|im_end|>")
    assert boxes_of(found) == objects
    assert (found.truncated, found.dropped_by_reason, found.prefix_text) == (False, {}, text[:-1])
    first, second, third, _ = found.objects
    assert [text[slice(*obj.desc_span)] for obj in found.objects] == ["cat", "cat", "dog", "cat"]
    assert [text[slice(*obj.span)] for obj in (first, second, third)] == [
        f"cat{tokens_of(A)}", tokens_of(B), f"dog{tokens_of(A)}",
    ]  # fmt: skip
    assert first.desc_token_span == second.desc_token_span
    assert json.loads(FORM.strict_json(text)) == {
        "objects": [{"desc": obj.desc, "bbox_2d": list(obj.bins)} for obj in objects]
    }


def test_an_object_takes_at_most_nine_tokens_of_the_real_vocabulary(real_tok):
    """`cat` one token, `refrigerator` three; the line's end, the brackets and their newline are a token each."""

    def num_tokens(objects):
        return len(real_tok.encode(FORM.serialize(objects) + "<|im_end|>", add_special_tokens=False))

    assert num_tokens([]) == 3
    assert num_tokens([box("cat")]) == 3 + 5
    assert num_tokens([box("cat"), box("dog"), box("refrigerator")]) == 3 + 5 + 6 + 8
    assert num_tokens([box("cat"), box("cat", B)]) == 3 + 5 + 4
    coordjson = len(real_tok.encode(form_of().serialize([box("cat")] * 2), add_special_tokens=False)) - len(
        real_tok.encode(form_of().serialize([box("cat")]), add_special_tokens=False)
    )
    assert coordjson == 24


REASONS = {
    "cat": "missing_geom",
    "cat 1 2 3 4": "missing_geom",
    tokens_of(A): "missing_desc",
    "  " + tokens_of(A): "missing_desc",
    "cat" + tokens_of(A[:3]): "wrong_arity",
    "cat" + tokens_of(A, A[:1]): "wrong_arity",
    "cat" + tokens_of(A[:2]) + " " + tokens_of(A[2:]): "non_coord_token",
    "cat" + tokens_of(A) + ",": "non_coord_token",
    "a\\qb" + tokens_of(A): "malformed",
    "a\tb" + tokens_of(A): "malformed",
    "a<|box_start|>" + tokens_of(A): "malformed",
    "<|coord_07|>" + tokens_of(A): "malformed",
    "": "malformed",
    "cat" + tokens_of((30, 20, 10, 40)): "bbox_invalid",
}


@pytest.mark.parametrize(("line", "reason"), REASONS.items())
def test_what_is_no_box_is_dropped_for_a_reason(demo, line, reason):
    good = "\ndog" + tokens_of(B)
    found = read(demo, f"[\n{line}{good}]")
    assert (found.dropped_by_reason, boxes_of(found)) == ({reason: 1}, [box("dog", B)])
    assert found.prefix_text == f"[\n{line}{good}"
    alone = read(demo, f"[\n{line}\n]")  # the prefix goes on behind what was dropped
    assert (alone.dropped_by_reason.get(reason), alone.objects) == (1, [])
    target = alone.prefix_text + FORM.append_fragment([box("dog", B)], alone.prefix_text)
    assert boxes_of(read(demo, target)) == [box("dog", B)]
    closed = alone.prefix_text + FORM.append_fragment([], alone.prefix_text)
    assert not read(demo, closed).truncated


def test_swapped_corners_drop_one_box_of_a_line(demo):
    found = read(demo, f"[\ncat{tokens_of(A, (3, 2, 1, 4), B)}]")
    assert (found.dropped_by_reason, boxes_of(found)) == ({"bbox_invalid": 1}, [box("cat"), box("cat", B)])
    assert [type(record).__name__ for record in found.records] == [
        "ParsedObject",
        "DroppedRecord",
        "ParsedObject",
    ]


def test_a_coordinate_that_ordinary_tokens_spell_is_ambiguous(demo):
    ids = demo.encode("[\ncat" + tokens_of(A[:3]), add_special_tokens=False)
    ids += [demo.convert_tokens_to_ids(symbol) for symbol in "<|coord_40|>"]
    ids += demo.encode("]", add_special_tokens=False)
    found = FORM.parse(ids, demo)
    assert (found.dropped_by_reason, found.objects) == ({"ambiguous": 1}, [])


def test_text_before_the_list_and_no_list(demo):
    found = read(demo, f"Sure:\n[\ncat{tokens_of(A)}] and more")
    assert (found.leading_text, boxes_of(found), found.prefix_text) == (True, [box("cat")], "[\n")
    for text, is_cut in (("cat", False), ("", False), ("[", True), ("[cat]", False)):
        found = read(demo, text)
        assert (found.invalid_rollout, found.truncated, found.prefix_text) == (True, is_cut, "[\n"), text


def test_token_types(demo):
    ids = demo.encode(
        FORM.serialize([box("red box"), box("red box", B), box("x")]) + "<|im_end|>", add_special_tokens=False
    )
    types, names = FORM.token_types(ids, demo), demo.convert_ids_to_tokens(ids)
    of = {kind: [names[i] for i in np.flatnonzero(types == kind)] for kind in TokenType}
    assert "".join(of[TokenType.DESC]).replace("Ġ", " ") == "red boxx"
    assert of[TokenType.COORD] == [f"<|coord_{k}|>" for k in (*A, *B, *A)]
    assert of[TokenType.STRUCT] == ["[", "Ċ", "Ċ", "]"]
    assert of[TokenType.EOS] == ["<|im_end|>"]


def test_what_it_cannot_write_or_continue():
    with pytest.raises(RecordError, match="is a polygon, and the compact form writes boxes only"):
        FORM.serialize([BoxObject("leaf", "poly", (1, 2, 3, 4, 5, 6))])
    for prefix, why in (
        ("cat", "no open list"),
        (f"[\ncat{tokens_of(A)}]", "already closed"),
        ("[\n]", "already"),
    ):
        with pytest.raises(RolloutError, match=why):
            FORM.append_fragment([box("cat")], prefix)


bins = st.integers(0, 999)
hard = st.sampled_from(
    ["]", "\n", "\\", '"', "<|", "<", "|>", "<|coord_5|>", "<|im_end|>", "\\n", "\\u0041", "\u0301", " "]
)
names = st.lists(st.one_of(hard, st.characters(codec="utf-8")), min_size=1, max_size=6).map("".join)
boxes = st.builds(
    lambda desc, x, y: BoxObject(desc, "bbox_2d", (min(x), min(y), max(x), max(y))),
    names.filter(str.strip), st.tuples(bins, bins), st.tuples(bins, bins),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(objects=st.lists(boxes, max_size=4), data=st.data())
def test_any_name_comes_back(tokenizers, objects, data):
    tok = tokenizers[data.draw(st.sampled_from(sorted(tokenizers)))]
    text = FORM.serialize(objects)
    found = read(tok, text + "<|im_end|>")
    assert boxes_of(found) == objects
    assert (found.truncated, found.dropped_by_reason, found.leading_text) == (False, {}, False)
    assert json.loads(FORM.strict_json(text))["objects"] == [
        {"desc": obj.desc, "bbox_2d": list(obj.bins)} for obj in objects
    ]


def plain_reader(text):
    """Names and bins of what stands behind `[` and a line's end, line by line, without positions."""
    found = []
    body = text.split("[\n", 1)[1]
    for line in body.split("\n"):
        if line.startswith("]"):
            break
        first = line.find("<|coord_")
        end = line.find("]", first) if first >= 0 else -1
        name, *rest = (line if end < 0 else line[:end]).split("<|coord_")
        numbers = [part.removesuffix("|>") for part in rest]
        if name and numbers and len(numbers) % 4 == 0 and all(n.isdigit() for n in numbers):
            found += [(name, tuple(map(int, numbers[i : i + 4]))) for i in range(0, len(numbers), 4)]
        if end >= 0:
            break
    return found


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_faulty_answers_raise_nothing_keep_what_a_plain_reader_keeps_and_go_on(demo, seed):
    rng = random.Random(seed)
    text = f"[\ncat{tokens_of(A, B)}\ndog{tokens_of(A)}\nbird{tokens_of(C)}]"
    pieces = [f"<|coord_{k}|>" for k in A] + ["\n", "]", "x", "cat"]
    ids = demo.encode(text, add_special_tokens=False)
    for _ in range(rng.randint(0, 3)):
        at = rng.randrange(2, len(ids))
        ids[at : at + rng.randint(0, 2)] = demo.encode(rng.choice(pieces), add_special_tokens=False)
    ids = ids[: rng.randint(3, len(ids))] if rng.random() < 0.3 else ids
    found = FORM.parse(ids, demo)
    if not found.truncated:
        kept = [(name, b) for name, b in plain_reader(found.text) if b[0] <= b[2] and b[1] <= b[3]]
        assert [(obj.desc, obj.bins) for obj in found.objects] == kept
    missed = [box("bird", B), box("cat", A)]
    target = found.prefix_text + FORM.append_fragment(missed, found.prefix_text)
    again = read(demo, target)
    assert boxes_of(again) == boxes_of(found) + missed
    assert not again.truncated


def test_it_needs_coordinate_tokens():
    plain = train_tiny_tokenizer(coord_tokens=False)
    with pytest.raises(Exception, match="lacks 1000 of 1000"):
        FORM.parse([1], plain)
