"""The grammar of a form: every answer that `serialize` writes is in it, nothing that `parse` drops is."""

from __future__ import annotations

import sys

import llguidance
import llguidance.hf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.codec.forms import grammar
from coordexp.codec.forms.choose import form_of
from coordexp.codec.schema import BoxObject
from coordexp.errors import ConfigError

FORMS = {
    "desc_first": form_of(),
    "geometry_first": form_of("coordjson", "geometry_first"),
    "compact": form_of("compact"),
}
A = "[<|coord_1|>, <|coord_2|>, <|coord_3|>, <|coord_4|>]"
C = "<|coord_1|><|coord_2|><|coord_3|><|coord_4|>"
BINS = st.tuples(*[st.integers(0, 499)] * 2, *[st.integers(500, 999)] * 2)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
BOXES = st.lists(st.builds(BoxObject, TEXT, st.just("bbox_2d"), BINS), max_size=4)


@pytest.fixture(scope="module")
def matchers(demo):
    """(form, largest number of objects, polygons) -> a matcher at its beginning."""
    tokenizer = llguidance.hf.from_tokenizer(demo, eos_token=demo.convert_tokens_to_ids("<|im_end|>"))
    ids, made = CoordVocab.from_tokenizer(demo).ids, {}

    def matcher(form, max_objects=None, allow_poly=True):
        key = form, max_objects, allow_poly
        if key not in made:
            text = grammar.grammar_of(FORMS[form], ids, allow_poly=allow_poly, max_objects=max_objects)
            made[key] = llguidance.LLMatcher(tokenizer, text)
        assert not made[key].is_error(), made[key].get_error()
        return made[key].deep_copy()

    return matcher


def accepts(matcher, tok, text):
    ids = tok.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@settings(max_examples=60, deadline=None)
@given(form=st.sampled_from(sorted(FORMS)), objects=BOXES)
def test_whatever_serialize_writes_is_in_it(matchers, demo, form, objects):
    assert accepts(matchers(form), demo, FORMS[form].serialize(objects))


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("desc_first", '{"objects":[]}'),  # blanks stand as serialize writes them
        ("desc_first", '{"objects": []} '),
        ("desc_first", '{"objects": [{"desc": "", "bbox_2d": ' + A + "}]}"),
        ("desc_first", '{"objects": [{"desc": " \\n\\u00a0", "bbox_2d": ' + A + "}]}"),
        ("desc_first", '{"objects": [{"desc": "a\\x", "bbox_2d": ' + A + "}]}"),
        ("desc_first", '{"objects": [{"desc": "a\\ud83d", "bbox_2d": ' + A + "}]}"),
        ("desc_first", '{"objects": [{"desc": "a<|b", "bbox_2d": ' + A + "}]}"),
        ("desc_first", '{"objects": [{"desc": "a\nb", "bbox_2d": ' + A + "}]}"),
        ("desc_first", '{"objects": [{"bbox_2d": ' + A + ', "desc": "a"}]}'),  # the other order
        ("geometry_first", '{"objects": [{"desc": "a", "bbox_2d": ' + A + "}]}"),
        ("desc_first", '{"objects": [{"desc": "a", "bbox_2d": [<|coord_1|>, <|coord_2|>, <|coord_3|>]}]}'),
        ("desc_first", '{"objects": [{"desc": "a", "bbox_2d": [1, 2, 3, 4]}]}'),
        ("desc_first", '{"objects": [{"desc": "a", "poly": ' + A + "}]}"),  # four are too few
        ("desc_first", '{"objects": [{"desc": "a", "bbox_2d": ' + A + "},]}"),
        ("desc_first", '{"objects": [{"desc": "a", "bbox_2d": ' + A),
        ("compact", "[\n" + C + "]"),
        ("compact", "[\n \n" + C + "]"),
        ("compact", "[\ncat]"),
        ("compact", "[\n]cat" + C + "]"),
        ("compact", "[\ncat" + C + "\n]"),
        ("compact", "[\ncat" + C + "<|coord_5|>]"),
    ],
)
def test_what_the_parser_drops_or_serialize_never_writes_is_not(matchers, demo, form, text):
    assert not accepts(matchers(form), demo, text)


def test_escapes_of_every_kind_are_in_it(matchers, demo):
    text = '{"objects": [{"desc": "\\u00e9\\ud83d\\ude00\\"\\\\\\/\\b", "bbox_2d": ' + A + "}]}"
    assert accepts(matchers("desc_first"), demo, text)
    parsed = FORMS["desc_first"].parse(demo.encode(text, add_special_tokens=False), demo)
    assert [obj.desc for obj in parsed.objects] == ['é😀"\\/\b']


def test_polygons_and_the_number_of_objects_may_be_limited(matchers, demo):
    poly = BoxObject("a", "poly", (1, 2, 3, 4, 5, 6, 7, 8))
    box = BoxObject("a", "bbox_2d", (1, 2, 3, 4))
    for form in ("desc_first", "geometry_first"):
        text = FORMS[form].serialize([poly, box])
        assert accepts(matchers(form), demo, text)
        assert not accepts(matchers(form, allow_poly=False), demo, text)
        assert accepts(matchers(form, 2), demo, text)
        assert not accepts(matchers(form, 1), demo, text)
        assert accepts(matchers(form, 1), demo, FORMS[form].serialize([box]))


def test_its_blanks_are_those_that_str_strip_takes(demo):
    """Every character of Unicode, alone and escaped: a description of blanks only is what the grammar leaves out."""
    blanks = [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace()]
    tokenizer = llguidance.hf.from_tokenizer(demo)
    rule = r'start: D "|"' "\n" rf"D: /({grammar._BLANK})*/"
    matcher = llguidance.LLMatcher(tokenizer, rule)

    def is_blank(text):
        return accepts(matcher.deep_copy(), demo, text + "|")

    for char in blanks:
        assert is_blank(f"\\u{ord(char):04x}"), hex(ord(char))
        assert is_blank(char) == (ord(char) >= 0x20)  # controls are never written as they are
    others = [
        chr(code) for code in (*range(0x21, 0x300), 0x180E, 0x200B, 0x2060, 0xFEFF) if chr(code) not in blanks
    ]
    assert not any(is_blank(char) or is_blank(f"\\u{ord(char):04x}") for char in others if char != "|")


@pytest.mark.parametrize("name", ["coordjson_numbers", "qwen"])
def test_forms_of_numbers_are_refused_by_name(name):
    with pytest.raises(ConfigError, match=rf"\({name}\) are of numbers"):
        grammar.grammar_of(form_of(name), range(1000))
