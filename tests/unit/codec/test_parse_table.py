"""What becomes of a malformed rollout: one row per case, the comment names it.

Notation: `<5>` is the coordinate token of bin 5, `‹5›` is the same text spelled by ordinary tokens. Every row
is read with both tokenizers and also with one token per byte; the outcome must not depend on it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pytest
from codec_tokenizers import ENCODERS, spell

from coordexp.codec.parse import DroppedRecord, parse_rollout
from coordexp.codec.schema import BoxObject

HEAD = '{"objects": ['
CAT = '{"desc": "cat", "bbox_2d": [<1>, <2>, <3>, <4>]}'
DOG = '{"desc": "dog", "bbox_2d": [<5>, <6>, <7>, <8>]}'
TRI = '{"desc": "sail", "poly": [<1>, <2>, <3>, <4>, <5>, <6>]}'
BOX = "[<1>, <2>, <3>, <4>]"

CAT_OBJECT = BoxObject("cat", "bbox_2d", (1, 2, 3, 4))
DOG_OBJECT = BoxObject("dog", "bbox_2d", (5, 6, 7, 8))
TRI_OBJECT = BoxObject("sail", "poly", (1, 2, 3, 4, 5, 6))


@dataclass
class Row:
    """A rollout and its outcome. prefix None: the fallback `{"objects": [`."""

    text: str
    objects: list[BoxObject]
    dropped: dict[str, int] = field(default_factory=dict)
    prefix: str | None = None
    truncated: bool = False
    invalid: bool = False
    leading_text: bool = False
    allow_poly: bool = True


def one(record: str, reason: str, *, allow_poly: bool = True) -> Row:
    """A rollout whose only fault is one dropped record between two good ones."""
    text = f"{HEAD}{CAT}, {record}, {DOG}"
    return Row(text + "]}", [CAT_OBJECT, DOG_OBJECT], {reason: 1}, text, allow_poly=allow_poly)


def kept(record: str, obj: BoxObject) -> Row:
    """An unusual record that is nevertheless kept."""
    return Row(f"{HEAD}{record}]}}", [obj], {}, HEAD + record)


def no_container(text: str, *, truncated: bool = False) -> Row:
    return Row(text, [], invalid=True, truncated=truncated)


ROWS = {
    # --- the container ---
    # a well-formed rollout, for comparison
    "well formed": Row(
        f"{HEAD}{CAT}, {DOG}]}}<|im_end|>", [CAT_OBJECT, DOG_OBJECT], {}, f"{HEAD}{CAT}, {DOG}",
    ),
    # a well-formed empty set
    "empty set": Row(f"{HEAD}]}}<|im_end|>", [], {}, HEAD),
    # nothing but the end of the turn
    "only im_end": no_container("<|im_end|>"),
    # no token at all
    "no token": no_container(""),
    # prose
    "prose": no_container("I see two cats."),
    # an object without the objects key
    "other object": no_container('{"cats": 2}'),
    # another key before objects
    "key before objects": no_container(f'{{"image": 1, "objects": [{CAT}]}}'),
    # the container nested in another object
    "nested container": no_container(f'{{"result": {HEAD}{CAT}]}}}}'),
    # objects is an object
    "objects is an object": no_container(f'{{"objects": {CAT}}}'),
    # objects is a string
    "objects is a string": no_container('{"objects": "none"}'),
    # objects is null
    "objects is null": no_container('{"objects": null}'),
    # the key in single quotes
    "single-quoted key": no_container(f"{{'objects': [{CAT}]}}"),
    # the key in capitals
    "capital key": no_container(f'{{"Objects": [{CAT}]}}'),
    # a bare array of records
    "bare array": no_container(f"[{CAT}]"),
    # cut within the key objects
    "cut in the key": no_container('{"obj', truncated=True),
    # cut before the opening bracket
    "cut before the bracket": no_container('{"objects": ', truncated=True),
    # cut after the opening bracket
    "cut after the bracket": Row(HEAD, [], {}, HEAD, truncated=True),
    # whitespace before and inside the container is fine
    "spaces around": Row(
        f'\n {{ "objects" :\t[ {CAT} ] }} ', [CAT_OBJECT], {}, f'\n {{ "objects" :\t[ {CAT}',
    ),
    # text before the container: objects count, the prefix falls back
    "leading text": Row(f"Sure: {HEAD}{CAT}]}}", [CAT_OBJECT], leading_text=True),
    # a code fence around the container
    "code fence": Row(f"```json\n{HEAD}{CAT}]}}\n```", [CAT_OBJECT], leading_text=True),
    # leading text and a dropped record
    "leading text, drop": Row(
        f"Sure: {HEAD}{CAT}, {{}}]}}", [CAT_OBJECT], {"missing_desc": 1}, leading_text=True,
    ),
    # leading text that holds a brace: what stands at the first brace is no container
    "brace in leading text": no_container(f"Set {{a}}: {HEAD}{CAT}]}}"),
    # --- after the array ---
    # another key after the array is cut
    "key after the array": Row(f'{HEAD}{CAT}], "count": 1}}', [CAT_OBJECT], {}, HEAD + CAT),
    # prose after the container is cut
    "prose after": Row(f"{HEAD}{CAT}]}} Done.", [CAT_OBJECT], {}, HEAD + CAT),
    # a second container is cut
    "second container": Row(f"{HEAD}{CAT}]}}{HEAD}{DOG}]}}", [CAT_OBJECT], {}, HEAD + CAT),
    # the array closed, the container did not
    "container not closed": Row(f"{HEAD}{CAT}]", [CAT_OBJECT], {}, HEAD + CAT, truncated=True),
    # a brace in a later string does not close the container
    "brace in later string": Row(f'{HEAD}{CAT}], "a": "}}', [CAT_OBJECT], {}, HEAD + CAT, truncated=True),
    # a record after the closed array
    "record after array": Row(f"{HEAD}{CAT}], {DOG}}}", [CAT_OBJECT], {}, HEAD + CAT),
    # --- the end of the turn ---
    # no im_end at all
    "no im_end": Row(f"{HEAD}{CAT}]}}", [CAT_OBJECT], {}, HEAD + CAT),
    # tokens after im_end
    "text after im_end": Row(f"{HEAD}{CAT}]}}<|im_end|>{HEAD}{DOG}]}}", [CAT_OBJECT], {}, HEAD + CAT),
    # im_end in the middle of a record
    "im_end in a record": Row(
        f'{HEAD}{CAT}, {{"desc": "d<|im_end|>og"', [CAT_OBJECT], {}, HEAD + CAT, truncated=True,
    ),
    # im_end between records
    "im_end between records": Row(
        f"{HEAD}{CAT}, <|im_end|>{DOG}]}}", [CAT_OBJECT], {}, HEAD + CAT, truncated=True,
    ),
    # padding after im_end
    "padding": Row(f"{HEAD}{CAT}]}}<|im_end|><|endoftext|><|endoftext|>", [CAT_OBJECT], {}, HEAD + CAT),
    # --- truncation ---
    # cut inside the second record's desc
    "cut in desc": Row(f'{HEAD}{CAT}, {{"desc": "do', [CAT_OBJECT], {}, HEAD + CAT, truncated=True),
    # cut inside the second record's coordinates
    "cut in coordinates": Row(f"{HEAD}{CAT}, {DOG[:38]}", [CAT_OBJECT], {}, HEAD + CAT, truncated=True),
    # cut after the comma
    "cut after comma": Row(f"{HEAD}{CAT}, ", [CAT_OBJECT], {}, HEAD + CAT, truncated=True),
    # cut right after a record
    "cut after record": Row(f"{HEAD}{CAT}", [CAT_OBJECT], {}, HEAD + CAT, truncated=True),
    # cut inside the first record
    "cut in first record": Row(f'{HEAD}{{"desc": "cat", "bbox_2d": [<1>', [], {}, HEAD, truncated=True),
    # cut inside an element that is no object
    "cut in a string element": Row(f'{HEAD}{CAT}, "do', [CAT_OBJECT], {}, HEAD + CAT, truncated=True),
    # cut inside a bare element
    "cut in a bare element": Row(f"{HEAD}{CAT}, 12", [CAT_OBJECT], {}, HEAD + CAT, truncated=True),
    # cut inside an escape
    "cut in an escape": Row(f'{HEAD}{CAT}, {{"desc": "a\\', [CAT_OBJECT], {}, HEAD + CAT, truncated=True),
    # --- desc ---
    # no desc
    "desc missing": one(f'{{"bbox_2d": {BOX}}}', "missing_desc"),
    # another key where desc should be
    "label for desc": one(f'{{"label": "cat", "bbox_2d": {BOX}}}', "missing_desc"),
    # empty desc
    "desc empty": one(f'{{"desc": "", "bbox_2d": {BOX}}}', "missing_desc"),
    # desc null
    "desc null": one(f'{{"desc": null, "bbox_2d": {BOX}}}', "missing_desc"),
    # desc a list of strings
    "desc list": one(f'{{"desc": ["cat"], "bbox_2d": {BOX}}}', "missing_desc"),
    # desc a bare coordinate token
    "desc coordinate": one(f'{{"desc": <5>, "bbox_2d": {BOX}}}', "missing_desc"),
    # an empty record lacks desc first of all
    "empty record": one("{}", "missing_desc"),
    # a desc of blanks only is no desc, written plainly, with escapes, or in another order
    "desc of spaces": one(f'{{"desc": "  ", "bbox_2d": {BOX}}}', "missing_desc"),
    "desc of escaped blanks": one(f'{{"desc": "\\t\\u00a0\\n", "bbox_2d": {BOX}}}', "missing_desc"),
    "blank desc behind the box": one(f'{{"bbox_2d" : {BOX}, "desc" : " \u3000"}}', "missing_desc"),
    # braces, brackets and commas inside a desc
    "structure in desc": kept(
        f'{{"desc": "a}}, {{[]", "bbox_2d": {BOX}}}', BoxObject("a}, {[]", "bbox_2d", (1, 2, 3, 4))
    ),
    # escaped quote and backslash in a desc
    "escapes in desc": kept(
        f'{{"desc": "\\"a\\" \\\\", "bbox_2d": {BOX}}}', BoxObject('"a" \\', "bbox_2d", (1, 2, 3, 4))
    ),
    # a surrogate pair written as escapes is one character
    "surrogate pair": kept(
        f'{{"desc": "\\ud83d\\udc31", "bbox_2d": {BOX}}}', BoxObject("🐱", "bbox_2d", (1, 2, 3, 4))
    ),
    # a coordinate token inside a desc is text; the box is the four others
    "coordinate in desc": kept(
        f'{{"desc": "at <9>", "bbox_2d": {BOX}}}', BoxObject("at <|coord_9|>", "bbox_2d", (1, 2, 3, 4))
    ),
    # --- geometry ---
    # no geometry
    "geometry missing": one('{"desc": "cat"}', "missing_geom"),
    # a key without an array is no geometry
    "score for geometry": one('{"desc": "cat", "score": 0.5}', "missing_geom"),
    # geometry null
    "geometry null": one('{"desc": "cat", "bbox_2d": null}', "missing_geom"),
    # geometry one string
    "geometry string": one('{"desc": "cat", "bbox_2d": "<1>, <2>, <3>, <4>"}', "missing_geom"),
    # bbox for bbox_2d
    "bbox": one(f'{{"desc": "cat", "bbox": {BOX}}}', "unknown_geom"),
    # polygon for poly
    "polygon": one(f'{{"desc": "cat", "polygon": {BOX}}}', "unknown_geom"),
    # line
    "line": one('{"desc": "cat", "line": [<1>, <2>]}', "unknown_geom"),
    # an unheard-of key with an array
    "unheard-of array": one(f'{{"desc": "cat", "frame": {BOX}}}', "unknown_geom"),
    # an empty box
    "empty box": one('{"desc": "cat", "bbox_2d": []}', "wrong_arity"),
    # a box of three
    "three values": one('{"desc": "cat", "bbox_2d": [<1>, <2>, <3>]}', "wrong_arity"),
    # a box of five
    "five values": one('{"desc": "cat", "bbox_2d": [<1>, <2>, <3>, <4>, <5>]}', "wrong_arity"),
    # a polygon of two points
    "two points": one('{"desc": "cat", "poly": [<1>, <2>, <3>, <4>]}', "wrong_arity"),
    # a polygon with an odd count
    "odd polygon": one('{"desc": "cat", "poly": [<1>, <2>, <3>, <4>, <5>, <6>, <7>]}', "wrong_arity"),
    # ints instead of tokens
    "ints": one('{"desc": "cat", "bbox_2d": [1, 2, 3, 4]}', "non_coord_token"),
    # one int among tokens
    "one int": one('{"desc": "cat", "bbox_2d": [<1>, <2>, 3, <4>]}', "non_coord_token"),
    # quoted tokens
    "quoted tokens": one('{"desc": "cat", "bbox_2d": ["<1>", "<2>", "<3>", "<4>"]}', "non_coord_token"),
    # nested points
    "nested points": one('{"desc": "cat", "bbox_2d": [[<1>, <2>], [<3>, <4>]]}', "non_coord_token"),
    # another special token
    "special token": one('{"desc": "cat", "bbox_2d": [<1>, <2>, <3>, <|box_start|>]}', "non_coord_token"),
    # a bin beyond the vocabulary
    "bin 1000": one('{"desc": "cat", "bbox_2d": [<1>, <2>, <3>, <|coord_1000|>]}', "non_coord_token"),
    # a leading zero
    "leading zero": one('{"desc": "cat", "bbox_2d": [<1>, <2>, <3>, <|coord_04|>]}', "non_coord_token"),
    # x2 < x1
    "x swapped": one('{"desc": "cat", "bbox_2d": [<3>, <2>, <1>, <4>]}', "bbox_invalid"),
    # y2 < y1
    "y swapped": one('{"desc": "cat", "bbox_2d": [<1>, <4>, <3>, <2>]}', "bbox_invalid"),
    # a box of one point has x2 = x1 and is kept
    "point box": kept(
        '{"desc": "cat", "bbox_2d": [<1>, <2>, <1>, <2>]}', BoxObject("cat", "bbox_2d", (1, 2, 1, 2))
    ),
    # a polygon where boxes only are taken
    "polygon, boxes only": one(TRI, "poly_unsupported", allow_poly=False),
    # any polygon where boxes only are taken, whatever its arity
    "bad polygon, boxes only": one('{"desc": "sail", "poly": [<1>]}', "poly_unsupported", allow_poly=False),
    # a polygon among boxes
    "polygon among boxes": Row(
        f"{HEAD}{CAT}, {TRI}, {DOG}]}}", [CAT_OBJECT, TRI_OBJECT, DOG_OBJECT], {},
        f"{HEAD}{CAT}, {TRI}, {DOG}",
    ),
    # one coordinate spelled by ordinary tokens
    "one spelled coordinate": one('{"desc": "cat", "bbox_2d": [<1>, <2>, ‹3›, <4>]}', "ambiguous"),
    # all coordinates spelled by ordinary tokens
    "all spelled": one('{"desc": "cat", "bbox_2d": [‹7›, ‹7›, ‹7›, ‹7›]}', "ambiguous"),
    # a spelled swapped box is ambiguous, and nothing else besides
    "spelled and swapped": one('{"desc": "cat", "bbox_2d": [‹9›, <2>, <3>, <4>]}', "ambiguous"),
    # a spelled coordinate in a desc does not matter
    "spelled in desc": kept(
        f'{{"desc": "at ‹9›", "bbox_2d": {BOX}}}', BoxObject("at <|coord_9|>", "bbox_2d", (1, 2, 3, 4))
    ),
    # --- keys ---
    # geometry before desc is fine in either mode
    "geometry first": kept(f'{{"bbox_2d": {BOX}, "desc": "cat"}}', CAT_OBJECT),
    # an extra key
    "extra key": one(f'{{"desc": "cat", "bbox_2d": {BOX}, "score": 0.9}}', "key_invalid"),
    # an extra nested value
    "extra object": one(f'{{"desc": "cat", "bbox_2d": {BOX}, "attr": {{"a": [1, {{}}]}}}}', "key_invalid"),
    # desc twice
    "desc twice": one(f'{{"desc": "cat", "desc": "dog", "bbox_2d": {BOX}}}', "key_invalid"),
    # the box twice
    "box twice": one(f'{{"desc": "cat", "bbox_2d": {BOX}, "bbox_2d": {BOX}}}', "key_invalid"),
    # desc twice, the second time with an escape
    "desc twice, escaped": one(
        f'{{"desc": "cat", "d\\u0065sc": "dog", "bbox_2d": {BOX}}}', "key_invalid"
    ),
    # a key written with an escape is the same key
    "escaped key": kept(f'{{"d\\u0065sc": "cat", "bbox_2d": {BOX}}}', CAT_OBJECT),
    # box and polygon in one record
    "two geometries": one(f'{{"desc": "cat", "bbox_2d": {BOX}, {TRI[17:]}', "key_invalid"),
    # --- elements that are no object ---
    # a number, a string, null, an array as elements
    "number element": one("5", "key_invalid"),
    "string element": one('"a cat, {"', "key_invalid"),
    "null element": one("null", "key_invalid"),
    "array element": one(f"[{CAT}, [1]]", "key_invalid"),
    # prose between records
    "prose element": one("and also", "key_invalid"),
    # a number before the first record, and the same without a comma
    "number first": Row(f"{HEAD}5, {CAT}]}}", [CAT_OBJECT], {"key_invalid": 1}, f"{HEAD}5, {CAT}"),
    "number first, no comma": Row(
        f"{HEAD}5 {CAT}]}}", [], {"key_invalid": 1, "malformed": 1}, f"{HEAD}5 {CAT}"
    ),
    # only elements that are no objects: the prefix ends at the bracket
    "no object at all": Row(f"{HEAD}1, 2]}}", [], {"key_invalid": 2}, HEAD),
    # --- JSON syntax inside a record ---
    # an unknown escape
    "bad escape": one(f'{{"desc": "c\\at", "bbox_2d": {BOX}}}', "malformed"),
    # a short unicode escape
    "short unicode escape": one(f'{{"desc": "\\u12", "bbox_2d": {BOX}}}', "malformed"),
    # half a surrogate pair is no text
    "lone surrogate": one(f'{{"desc": "\\ud83d", "bbox_2d": {BOX}}}', "malformed"),
    # a raw newline inside a string
    "raw newline": one(f'{{"desc": "a\ncat", "bbox_2d": {BOX}}}', "malformed"),
    # a raw tab inside a string
    "raw tab": one(f'{{"desc": "a\tcat", "bbox_2d": {BOX}}}', "malformed"),
    # a newline between members is whitespace
    "newline between members": kept(f'{{"desc": "cat",\n  "bbox_2d":\n{BOX}\n}}', CAT_OBJECT),
    # no spaces at all
    "no spaces": kept('{"desc":"cat","bbox_2d":[<1>,<2>,<3>,<4>]}', CAT_OBJECT),
    # spaces everywhere
    "many spaces": kept('{ "desc" : "cat" , "bbox_2d" : [ <1> , <2> ,<3> , <4> ] }', CAT_OBJECT),
    # a missing colon
    "missing colon": one(f'{{"desc" "cat", "bbox_2d": {BOX}}}', "malformed"),
    # a missing comma between members
    "missing member comma": one(f'{{"desc": "cat" "bbox_2d": {BOX}}}', "malformed"),
    # a trailing comma in the record
    "trailing member comma": one(f'{{"desc": "cat", "bbox_2d": {BOX},}}', "malformed"),
    # an unquoted key
    "unquoted key": one(f'{{desc: "cat", "bbox_2d": {BOX}}}', "malformed"),
    # an unquoted desc
    "unquoted desc": one(f'{{"desc": cat, "bbox_2d": {BOX}}}', "malformed"),
    # single quotes
    "single quotes": one(f"{{'desc': 'cat', 'bbox_2d': {BOX}}}", "malformed"),
    # a member without a value
    "value missing": one(f'{{"desc": , "bbox_2d": {BOX}}}', "malformed"),
    # a missing comma between coordinates
    "missing coordinate comma": one('{"desc": "cat", "bbox_2d": [<1><2>, <3>, <4>]}', "malformed"),
    # a doubled comma between coordinates
    "doubled coordinate comma": one('{"desc": "cat", "bbox_2d": [<1>,, <2>, <3>, <4>]}', "malformed"),
    # a trailing comma after the coordinates
    "trailing coordinate comma": one('{"desc": "cat", "bbox_2d": [<1>, <2>, <3>, <4>,]}', "malformed"),
    # a missing square bracket ends with its record
    "missing bracket": one('{"desc": "cat", "bbox_2d": [<1>, <2>, <3>, <4>}', "malformed"),
    # a superfluous square bracket ends with its record
    "superfluous bracket": one(f'{{"desc": "cat", "bbox_2d": {BOX}]}}', "malformed"),
    # crossed brackets in an extra value
    "crossed brackets": one(f'{{"desc": "cat", "bbox_2d": {BOX}, "attr": {{"a": [1}}]}}', "malformed"),
    # round brackets
    "round brackets": one('{"desc": "cat", "bbox_2d": (<1>, <2>, <3>, <4>)}', "malformed"),
    # only a malformed record: it stays in the prefix
    "only a malformed record": Row(
        f'{HEAD}{{"desc": "c\\at", "bbox_2d": {BOX}}}]}}', [], {"malformed": 1},
        f'{HEAD}{{"desc": "c\\at", "bbox_2d": {BOX}}}',
    ),
    # --- separators and lost delimiters ---
    # no comma between records: the second is not separated
    "no comma": Row(f"{HEAD}{CAT} {DOG}]}}", [CAT_OBJECT], {"malformed": 1}, f"{HEAD}{CAT} {DOG}"),
    # two commas between records
    "two commas": Row(f"{HEAD}{CAT},, {DOG}]}}", [CAT_OBJECT], {"malformed": 1}, f"{HEAD}{CAT},, {DOG}"),
    # a comma before the first record
    "leading comma": Row(f"{HEAD}, {CAT}, {DOG}]}}", [DOG_OBJECT], {"malformed": 1}, f"{HEAD}, {CAT}, {DOG}"),
    # a comma after the last record
    "trailing comma": Row(f"{HEAD}{CAT}, ]}}", [CAT_OBJECT], {}, HEAD + CAT),
    # a superfluous brace after a record
    "superfluous brace": Row(
        f"{HEAD}{CAT}}}, {DOG}]}}", [CAT_OBJECT], {"malformed": 1}, f"{HEAD}{CAT}}}, {DOG}",
    ),
    # the array's bracket forgotten
    "missing array bracket": Row(
        f"{HEAD}{CAT}, {DOG}}}", [CAT_OBJECT, DOG_OBJECT], {}, f"{HEAD}{CAT}, {DOG}", truncated=True,
    ),
    # a record's brace forgotten: it takes the next record into itself and ends at the container's brace
    "missing record brace": Row(
        f"{HEAD}{CAT[:-1]}, {DOG}]}}", [], {"malformed": 1}, f"{HEAD}{CAT[:-1]}, {DOG}]}}", truncated=True
    ),
    # a desc whose closing quote is forgotten runs to the next quote and never ends
    "missing quote": Row(
        f'{HEAD}{CAT}, {{"desc": "dog, "bbox_2d": {BOX}}}]}}', [CAT_OBJECT], {}, HEAD + CAT, truncated=True
    ),
    # --- several at once ---
    # each dropped record counts once, under one reason
    "many faults": Row(
        f'{HEAD}{{}}, {CAT}, {{"desc": "a", "bbox": {BOX}}}, 7, {{"desc": "", "bbox_2d": [9]}}, {DOG}, {{"de',
        [CAT_OBJECT, DOG_OBJECT],
        {"missing_desc": 2, "unknown_geom": 1, "key_invalid": 1},
        f'{HEAD}{{}}, {CAT}, {{"desc": "a", "bbox": {BOX}}}, 7, {{"desc": "", "bbox_2d": [9]}}, {DOG}',
        truncated=True,
    ),
    # a last dropped record still ends the prefix
    "dropped at the end": Row(
        f"{HEAD}{CAT}, {{}}]}}", [CAT_OBJECT], {"missing_desc": 1}, f"{HEAD}{CAT}, {{}}",
    ),
}  # fmt: skip


def plain(text: str) -> str:
    return re.sub(r"[<‹](\d+)[>›]", r"<|coord_\1|>", text)


def token_ids(tok, text, encoder):
    parts = re.split(r"(‹\d+›)", text)
    return [
        i
        for n, part in enumerate(parts)
        if part
        for i in (spell(tok, plain(part)) if n % 2 else ENCODERS[encoder](tok, plain(part)))
    ]


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("name", ROWS)
def test_row(tok, name, encoder):
    row = ROWS[name]
    parsed = parse_rollout(token_ids(tok, row.text, encoder), tok, allow_poly=row.allow_poly)
    assert [obj.as_box() for obj in parsed.objects] == row.objects
    assert parsed.dropped_by_reason == row.dropped
    assert parsed.dropped_ambiguous == row.dropped.get("ambiguous", 0)
    assert parsed.dropped_invalid == sum(row.dropped.values()) - parsed.dropped_ambiguous
    assert parsed.prefix_text == plain(HEAD if row.prefix is None else row.prefix)
    flags = parsed.truncated, parsed.invalid_rollout, parsed.leading_text
    assert flags == (row.truncated, row.invalid, row.leading_text)
    assert parsed.text == plain(row.text).split("<|im_end|>")[0]


def test_every_reason_has_a_row():
    reasons = {reason for row in ROWS.values() for reason in row.dropped}
    assert reasons == {
        "missing_desc", "missing_geom", "wrong_arity", "non_coord_token", "poly_unsupported", "unknown_geom",
        "bbox_invalid", "key_invalid", "malformed", "ambiguous",
    }  # fmt: skip
    assert len(ROWS) >= 60


def test_im_end_fused_into_a_token_ends_the_response(fused):
    """One token holds `]}<|im_end|>`: the response and the prefix end inside it."""
    head = token_ids(fused, f"{HEAD}{CAT}"[:-2], "encode")
    fused_id = fused.convert_tokens_to_ids("]}<|im_end|>")
    parsed = parse_rollout([*head, fused_id, *token_ids(fused, f", {DOG}]}}", "encode")], fused)
    assert parsed.text == parsed.prefix_text == plain(HEAD + CAT)
    assert parsed.response_token_ids == parsed.prefix_token_ids == [*head, fused.convert_tokens_to_ids("]}")]
    assert parsed.num_verbatim_prefix_tokens == len(head) + 1
    assert parsed.truncated
    assert [obj.as_box() for obj in parsed.objects] == [CAT_OBJECT]


def test_im_end_spelled_by_ordinary_tokens_ends_the_response(demo):
    ids = token_ids(demo, f"{HEAD}{CAT}]}}", "encode")
    parsed = parse_rollout([*ids, *spell(demo, "<|im_end|>"), *ids], demo)
    assert parsed.response_token_ids == ids
    assert parsed.text == plain(f"{HEAD}{CAT}]}}")


def test_a_cut_inside_the_last_token_replaces_that_token_only(fused):
    ids = token_ids(fused, f"{HEAD}{CAT}, {DOG}]}}", "encode")
    assert fused.convert_ids_to_tokens(ids[-1]) == "]}]}"
    parsed = parse_rollout(ids, fused)
    assert parsed.prefix_token_ids == [*ids[:-1], fused.convert_tokens_to_ids("]}")]
    assert parsed.num_verbatim_prefix_tokens == len(ids) - 1


def test_a_token_over_two_records_belongs_to_both(fused):
    """One token holds `]}, {`, the end of one record and the start of the next."""
    first = token_ids(fused, f"{HEAD}{CAT}"[:-2], "encode")
    second = token_ids(fused, f"{DOG}]}}"[1:], "encode")
    parsed = parse_rollout([*first, fused.convert_tokens_to_ids("]},Ġ{"), *second], fused)
    cat, dog = parsed.objects
    assert cat.token_span == (1, len(first) + 1)
    assert dog.token_span == (len(first), len(first) + 1 + len(second))


def test_positions_and_spans_of_a_small_rollout(demo):
    ids = token_ids(demo, f'{HEAD}{{"desc": "猫", "bbox_2d": {BOX}}}, {{}}]}}', "bytes")
    parsed = parse_rollout(ids, demo)
    obj = parsed.objects[0]
    # one token per byte, 猫 is 3 bytes, and the coordinates stand after `... "bbox_2d": [`
    assert obj.span == (13, 13 + len(plain(f'{{"desc": "猫", "bbox_2d": {BOX}}}')))
    assert obj.desc_span == (23, 24)
    assert obj.token_positions == (41, 44, 47, 50)
    assert obj.token_span == (13, 53)
    assert parsed.records == [
        obj,
        DroppedRecord("missing_desc", (obj.span[1] + 2, obj.span[1] + 4), (55, 57)),
    ]
