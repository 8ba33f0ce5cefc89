"""Answers in other forms than CoordJSON: numbers in the same container, and Qwen3-VL's own form."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.codec.forms.choose import FORMS, form_of
from coordexp.codec.layout import QWEN
from coordexp.codec.schema import BoxObject
from coordexp.codec.token_types import TokenType
from coordexp.errors import ConfigError, RolloutError
from coordexp.models.tiny_tokenizer import train_tiny_tokenizer

CAT = BoxObject("cat", "bbox_2d", (12, 40, 310, 402))
DOG = BoxObject('a "big" dog', "bbox_2d", (0, 499, 500, 999))
POLY = BoxObject("leaf", "poly", (1, 2, 30, 40, 500, 600))
TEXTS = {
    "coordjson": '{"objects": [{"desc": "cat", "bbox_2d": [<|coord_12|>, <|coord_40|>, <|coord_310|>, <|coord_402|>]}, '
    '{"desc": "a \\"big\\" dog", "bbox_2d": [<|coord_0|>, <|coord_499|>, <|coord_500|>, <|coord_999|>]}]}',
    "coordjson_numbers": '{"objects": [{"desc": "cat", "bbox_2d": [12, 40, 310, 402]}, '
    '{"desc": "a \\"big\\" dog", "bbox_2d": [0, 499, 500, 999]}]}',
    "qwen": '[{"bbox_2d": [12, 40, 310, 402], "label": "cat"}, '
    '{"bbox_2d": [0, 499, 501, 1000], "label": "a \\"big\\" dog"}]',
    "compact": "[\ncat<|coord_12|><|coord_40|><|coord_310|><|coord_402|>\n"
    'a "big" dog<|coord_0|><|coord_499|><|coord_500|><|coord_999|>]',
}
EMPTY = {
    "coordjson": '{"objects": []}',
    "coordjson_numbers": '{"objects": []}',
    "qwen": "[]",
    "compact": "[\n]",
}
NUMBER_FORMS = ("coordjson_numbers", "qwen")


def ids_of(tok, text):
    return tok.encode(text, add_special_tokens=False)


def parsed(tok, name, text):
    return form_of(name).parse(ids_of(tok, text), tok)


def boxes_of(found):
    return [obj.as_box() for obj in found.objects]


@pytest.mark.parametrize("name", FORMS)
def test_what_is_written_and_read_back(tok, name):
    form = form_of(name)
    assert form.serialize([CAT, DOG]) == TEXTS[name]
    assert form.serialize([]) == EMPTY[name]
    found = parsed(tok, name, TEXTS[name] + "<|im_end|>")
    assert boxes_of(found) == [CAT, DOG]
    assert (found.invalid_rollout, found.truncated, found.leading_text) == (False, False, False)
    assert found.dropped_by_reason == {}
    assert found.prefix_text == TEXTS[name][: -len(form.closing)]
    strict = json.loads(form.strict_json(TEXTS[name]))
    assert [record["bbox_2d"] for record in (strict if name == "qwen" else strict["objects"])] == [
        [12, 40, 310, 402], [0, 499, 501, 1000] if name == "qwen" else [0, 499, 500, 999],
    ]  # fmt: skip


def test_numbers_of_qwens_scale_worked_by_hand():
    """n stands for n / 1000, bin k for k / 999; 500.5005 is nearer to 501, 499.4995 to 499."""
    scale = QWEN.scale
    assert [scale.number_of(k) for k in (0, 1, 499, 500, 501, 998, 999)] == [0, 1, 499, 501, 502, 999, 1000]
    assert [scale.bin_of(n) for n in (0, 1, 499, 500, 501, 999, 1000)] == [0, 1, 499, 500, 500, 998, 999]
    assert [scale.bin_of(n) for n in (-1, 1001)] == [None, None]
    for k in range(1000):
        number = scale.number_of(k)
        assert abs(number / 1000 - k / 999) <= 0.0005
        assert scale.bin_of(number) == k


REASONS = {
    "[12.5, 1, 2, 3]": "non_coord_token",
    "[-1, 1, 2, 3]": "non_coord_token",
    "[1001, 1, 2000, 3]": "non_coord_token",
    "[012, 1, 20, 3]": "non_coord_token",
    '["12", 1, 20, 3]': "non_coord_token",
    "[<|coord_1|>, <|coord_2|>, <|coord_3|>, <|coord_4|>]": "non_coord_token",
    "[1, 2, 3]": "wrong_arity",
    "[30, 1, 20, 3]": "bbox_invalid",
    "[[1, 2], [3, 4]]": "non_coord_token",
    "12": "missing_geom",
}


@pytest.mark.parametrize(("geometry", "reason"), REASONS.items())
def test_what_is_no_box_of_numbers_is_dropped_for_a_reason(demo, geometry, reason):
    text = f'[{{"bbox_2d": {geometry}, "label": "x"}}, {{"label": "cat", "bbox_2d": [12,40, 310,\n402]}}]'
    found = parsed(demo, "qwen", text)
    assert (found.dropped_by_reason, boxes_of(found)) == ({reason: 1}, [CAT])


def test_keys_of_another_form_are_not_its_own(demo):
    found = parsed(demo, "qwen", TEXTS["coordjson_numbers"])
    assert (found.invalid_rollout, found.objects) == (True, [])
    found = parsed(
        demo, "qwen", '[{"bbox_2d": [1, 2, 3, 4], "desc": "cat"}, {"point_2d": [1, 2], "label": "cat"}]'
    )
    assert found.dropped_by_reason == {"missing_desc": 1, "unknown_geom": 1}


def test_an_answer_in_a_code_fence_as_qwen_writes_it(tok):
    records = (
        '{"bbox_2d": [12, 40, 310, 402], "label": "cat"},\n\t{"bbox_2d": [0, 0, 1000, 500], "label": "sky"}'
    )
    text = f"```json\n[\n\t{records}\n]\n```"
    found = parsed(tok, "qwen", text)
    assert boxes_of(found) == [CAT, BoxObject("sky", "bbox_2d", (0, 0, 999, 500))]
    assert (found.leading_text, found.truncated, found.prefix_text) == (True, False, "[")
    cut = parsed(tok, "qwen", text[: text.index(' "sky"')])
    assert (boxes_of(cut), cut.truncated) == ([CAT], True)


def test_token_types_and_positions_of_numbers(real_tok):
    """Qwen writes a digit a token."""
    form = form_of("qwen")
    ids = ids_of(real_tok, TEXTS["qwen"] + "<|im_end|>")
    types, names = form.token_types(ids, real_tok), real_tok.convert_ids_to_tokens(ids)
    digits = [name for name, kind in zip(names, types, strict=True) if kind == TokenType.COORD]
    assert "".join(digits) == "12403104020" + "4995011000"
    assert types[-1] == TokenType.EOS
    of_descs = [names[i] for i in np.flatnonzero(types == TokenType.DESC)]
    assert of_descs == ["cat", "a", 'Ġ\\"', "big", '\\"', "Ġdog"]
    assert form.desc_token_positions(ids, real_tok) == np.flatnonzero(types == TokenType.DESC).tolist()
    cat, dog = form.parse(ids, real_tok).objects
    assert [names[p] for p in cat.token_positions] == list("1240310402")
    assert [names[p] for p in dog.token_positions] == list("04995011000")


def test_a_tokenizer_without_coordinate_tokens_writes_and_reads_numbers():
    plain = train_tiny_tokenizer(coord_tokens=False)
    for name in ("coordjson_numbers", "qwen"):
        ids = ids_of(plain, TEXTS[name] + "<|im_end|>")
        assert boxes_of(form_of(name).parse(ids, plain)) == [CAT, DOG]
        assert (form_of(name).token_types(ids, plain) == TokenType.COORD).sum() > 8
    with pytest.raises(ConfigError, match="lacks 1000 of 1000"):
        form_of("coordjson").parse([1], plain)


def test_what_cannot_be_continued_is_said_with_the_forms_own_opening():
    with pytest.raises(RolloutError, match=r"Expected '\['"):
        form_of("qwen").append_fragment([CAT], '{"objects": [')
    with pytest.raises(RolloutError, match="ends in neither"):
        form_of("qwen").append_fragment([CAT], EMPTY["qwen"])
    with pytest.raises(ConfigError, match="expected one of coordjson, coordjson_numbers, qwen, compact"):
        form_of("yaml")


bins = st.integers(0, 999)
descs = (
    st.text(min_size=1, max_size=8)
    .filter(lambda text: text.strip() and "\ufffd" not in text)
    .filter(lambda text: not any(0xD800 <= ord(c) <= 0xDFFF for c in text))
)
boxes = st.builds(
    lambda desc, x, y: BoxObject(desc, "bbox_2d", (min(x), min(y), max(x), max(y))),
    descs, st.tuples(bins, bins), st.tuples(bins, bins),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(objects=st.lists(boxes, max_size=4), missed=st.lists(boxes, max_size=3), data=st.data())
@pytest.mark.parametrize("name", [name for name in FORMS if name != "coordjson"])
def test_an_answer_that_is_cut_anywhere_keeps_its_whole_records_and_goes_on(
    tokenizers, name, objects, missed, data
):
    tok, form = tokenizers[data.draw(st.sampled_from(sorted(tokenizers)))], form_of(name)
    ids = ids_of(tok, form.serialize(objects) + "<|im_end|>")
    whole = form.parse(ids, tok)
    assert boxes_of(whole) == objects
    assert (whole.truncated, whole.dropped_by_reason) == (False, {})
    cut = form.parse(ids[: data.draw(st.integers(0, len(ids)))], tok)
    assert boxes_of(cut) == objects[: len(cut.objects)]
    assert cut.dropped_by_reason == {}
    target = cut.prefix_text + form.append_fragment(missed, cut.prefix_text)
    assert target == form.serialize(boxes_of(cut) + missed)
    assert boxes_of(form.parse(ids_of(tok, target), tok)) == boxes_of(cut) + missed


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
@pytest.mark.parametrize("name", NUMBER_FORMS)
def test_faulty_answers_raise_nothing_and_agree_with_a_plain_reader(demo, name, seed):
    """Reference: `json.loads` of every record by itself."""
    rng, form = random.Random(seed), form_of(name)
    text = TEXTS[name]
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice('{}[],:"1 -x') + text[at + rng.randint(0, 2) :]
    found = form.parse(ids_of(demo, text), demo)
    for obj in found.objects:
        record = json.loads(text[slice(*obj.span)])
        assert list(map(form.layout.scale.bin_of, record["bbox_2d"])) == list(obj.bins)
        assert record["label" if name == "qwen" else "desc"] == obj.desc
    if not found.prefix_is_fallback:
        target = found.prefix_text + form.append_fragment([POLY], found.prefix_text)
        assert boxes_of(form.parse(ids_of(demo, target), demo)) == [*boxes_of(found), POLY]


@pytest.mark.parametrize("name", FORMS)
def test_a_list_is_put_together_from_its_parts(name):
    """Records of two names, the text between them, and the name as it is written."""
    form = form_of(name)
    records = [
        form.serialize([obj]).removeprefix(form.opening).removesuffix(form.closing) for obj in (CAT, DOG)
    ]
    assert form.opening + form.separator.join(records) + form.closing == TEXTS[name]
    assert form.written_desc(DOG.desc) in records[1]
    assert form.written_desc("a<|b|>") == "a\\u003c|b|>"
