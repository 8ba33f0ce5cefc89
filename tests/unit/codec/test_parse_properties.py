"""Properties of the rollout parse that hold for every rollout, with three tokenizers."""

from __future__ import annotations

import json
import random
import time
import unicodedata
from itertools import accumulate

import numpy as np
import pytest
from codec_fuzz import mutate_ids, random_objects, random_rollout
from codec_reference import plain_parse
from codec_tokenizers import ENCODERS, FUSED_MERGES, encode, encode_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.codec.parse import DroppedRecord, desc_token_positions, parse_rollout
from coordexp.codec.pieces import pieces_of
from coordexp.codec.schema import BoxObject, DropReason
from coordexp.codec.serialize import append_fragment, serialize, to_strict_json
from coordexp.errors import ConfigError

bins = st.integers(0, 999)
descs = st.text(min_size=1, max_size=12).filter(str.strip)
boxes = st.builds(
    lambda desc, xs, ys: BoxObject(desc, "bbox_2d", (min(xs), min(ys), max(xs), max(ys))),
    descs,
    st.tuples(bins, bins),
    st.tuples(bins, bins),
)
polys = st.builds(
    lambda desc, points: BoxObject(desc, "poly", tuple(k for point in points for k in point)),
    descs,
    st.lists(st.tuples(bins, bins), min_size=3, max_size=5),
)
objects_lists = st.lists(st.one_of(boxes, polys), max_size=5)
field_orders = st.sampled_from(["desc_first", "geometry_first"])
seeds = st.integers(0, 2**32 - 1)
encoders = st.sampled_from(list(ENCODERS))

MANY = settings(max_examples=120, deadline=None)


def as_boxes(objects):
    return [obj.as_box() for obj in objects]


def full_decode(tok, ids):
    return tok.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_the_fused_tokenizer_fuses(fused):
    for merge in FUSED_MERGES:
        assert len(encode(fused, merge)) == 1, merge


@MANY
@given(objects=objects_lists, field_order=field_orders, encoder=encoders)
def test_serialize_tokenize_parse_is_the_identity(tok, objects, field_order, encoder):
    ids = ENCODERS[encoder](tok, serialize(objects, field_order) + "<|im_end|>")
    parsed = parse_rollout(ids, tok, field_order=field_order)
    assert as_boxes(parsed.objects) == objects
    assert parsed.dropped_by_reason == {}
    assert (parsed.invalid_rollout, parsed.truncated, parsed.leading_text) == (False, False, False)
    bin_of = pieces_of(tok).coord_vocab.bin_of
    for obj in parsed.objects:
        assert tuple(bin_of(parsed.response_token_ids[i]) for i in obj.token_positions) == obj.bins


@MANY
@given(objects=st.lists(st.one_of(boxes, polys), min_size=1, max_size=4), encoder=encoders, data=st.data())
def test_a_truncation_keeps_exactly_the_complete_records(tok, objects, encoder, data):
    ids = ENCODERS[encoder](tok, serialize(objects) + "<|im_end|>")[:-1]
    num_tokens = data.draw(st.integers(0, len(ids)))
    parsed = parse_rollout(ids[:num_tokens], tok)
    num_bytes = len(pieces_of(tok).join(ids[:num_tokens]))
    record_ends = [len(serialize(objects[: n + 1]).encode()) - len("]}") for n in range(len(objects))]
    num_complete = sum(end <= num_bytes for end in record_ends)
    assert as_boxes(parsed.objects) == objects[:num_complete]
    assert parsed.dropped_by_reason == {}
    assert parsed.prefix_text == serialize(objects[:num_complete])[: -len("]}")]
    has_container = num_bytes >= len('{"objects": [')
    assert parsed.invalid_rollout is not has_container
    assert parsed.truncated is (0 < num_bytes < len(serialize(objects).encode()))


@MANY
@given(seed=seeds, missed=st.lists(st.one_of(boxes, polys), max_size=3), encoder=encoders)
def test_prefix_and_fragment_hold_the_kept_records_then_the_missed_ones(tok, seed, missed, encoder):
    rng = random.Random(seed)
    records, kept = [], []
    for obj in random_objects(rng, 5):
        record = serialize([obj])[len('{"objects": [') : -len("]}")]
        fault = rng.choice(("", "", "", "score", "desc", "arity", "int"))
        if not fault:
            kept.append(obj)
        records.append(
            {
                "": record,
                "score": record[:-1] + ', "score": 0.5}',
                "desc": record.replace('"desc"', '"label"'),
                "arity": record.replace("]}", ", <|coord_1|>]}"),
                "int": record.replace("]}", ", 1]}"),
            }[fault]
        )
    ids = ENCODERS[encoder](tok, '{"objects": [' + ", ".join(records) + "]}")
    parsed = parse_rollout(mutate_ids(rng, ids, 1, 1)[: rng.randint(1, len(ids))] if seed % 2 else ids, tok)
    if parsed.prefix_is_fallback:
        return
    target = parsed.prefix_text + append_fragment(missed, parsed.prefix_text)
    reparsed = parse_rollout(encode(tok, target + "<|im_end|>"), tok)
    assert as_boxes(reparsed.objects) == as_boxes(parsed.prefix_objects) + missed
    assert not reparsed.truncated
    if seed % 2 == 0:
        assert as_boxes(parsed.objects) == kept
        strict = json.loads(to_strict_json(target))["objects"]
        valid = [r for r in strict if set(r) <= {"desc", "bbox_2d", "poly"} and "desc" in r]
        descs_and_bins = [(r["desc"], tuple(r.get("bbox_2d") or r["poly"])) for r in valid]
        expected = [(obj.desc, obj.bins) for obj in kept + missed]
        assert [pair for pair in descs_and_bins if pair in expected] == expected
        assert len(strict) == 5 + len(missed)


@settings(max_examples=400, deadline=None)
@given(seed=seeds)
def test_faulty_rollouts_agree_with_the_plain_parser(tok, seed):
    rng = random.Random(seed)
    ids = mutate_ids(rng, random_rollout(rng, tok), rng.choice((0, 0, 1, 3)), len(tok) + 10)
    allow_poly = rng.random() < 0.8
    parsed = parse_rollout(ids, tok, allow_poly=allow_poly)
    plain = plain_parse(ids, tok, allow_poly=allow_poly)
    assert [(o.desc, o.kind, o.bins, o.token_positions) for o in parsed.objects] == plain.objects
    assert parsed.dropped_invalid + parsed.dropped_ambiguous == plain.num_dropped
    assert parsed.prefix_text == plain.prefix_text
    assert (parsed.truncated, parsed.invalid_rollout, parsed.leading_text) == plain[3:]
    assert parsed == parse_rollout(ids, tok, allow_poly=allow_poly)
    check_invariants(parsed, ids, tok)


@MANY
@given(data=st.data())
def test_random_token_ids_never_raise(tok, data):
    ids = data.draw(st.lists(st.integers(0, len(tok) + 50), max_size=60))
    check_invariants(parse_rollout(ids, tok), ids, tok)


@MANY
@given(garbage=st.binary(max_size=60))
def test_random_bytes_in_the_array_never_raise(tok, garbage):
    pieces = pieces_of(tok)
    byte_ids = [pieces.encode_exactly(bytes([byte]))[0] for byte in garbage]
    ids = encode(tok, '{"objects": [') + byte_ids
    parsed = parse_rollout(ids, tok)
    assert parsed.text == full_decode(tok, parsed.response_token_ids)
    check_invariants(parsed, ids, tok)


def check_invariants(parsed, ids, tok):
    """What holds for every rollout."""
    num_bytes = len(pieces_of(tok).join(parsed.response_token_ids))
    ends = accumulate(len(pieces_of(tok)[i]) for i in ids)
    num_whole = min(sum(end <= num_bytes for end in ends), len(parsed.response_token_ids))
    assert parsed.response_token_ids[:num_whole] == ids[:num_whole]
    assert parsed.text == full_decode(tok, parsed.response_token_ids)
    assert "<|im_end|>" not in parsed.text

    assert parsed.prefix_text.endswith(("[", "}"))
    assert parsed.prefix_text == full_decode(tok, parsed.prefix_token_ids)
    num_verbatim = parsed.num_verbatim_prefix_tokens
    assert parsed.prefix_token_ids[:num_verbatim] == parsed.response_token_ids[:num_verbatim]
    if not parsed.prefix_is_fallback:
        assert parsed.text.startswith(parsed.prefix_text)
        rest = parsed.response_token_ids[num_verbatim : num_verbatim + 1]
        split_token_text = pieces_of(tok).join(rest)
        remainder = pieces_of(tok).join(parsed.prefix_token_ids[num_verbatim:])
        assert split_token_text.startswith(remainder)
        assert remainder == b"" or len(remainder) < len(split_token_text)

    assert sum(parsed.dropped_by_reason.values()) == parsed.dropped_invalid + parsed.dropped_ambiguous
    dropped = [record for record in parsed.records if isinstance(record, DroppedRecord)]
    assert [record for record in parsed.records if record not in dropped] == parsed.objects
    num_non_objects = sum(parsed.dropped_by_reason.values()) - len(dropped)
    assert 0 <= num_non_objects <= parsed.dropped_by_reason.get(DropReason.KEY_INVALID, 0)
    for record in parsed.records:
        text = parsed.text[slice(*record.span)]
        assert text[0] + text[-1] == "{}"
    for obj in parsed.objects:
        start, stop = obj.desc_span
        assert parsed.text[start - 1] == parsed.text[stop] == '"'
        assert json.loads(parsed.text[start - 1 : stop + 1]) == obj.desc
        first, last = obj.token_span
        assert first <= min(obj.token_positions)
        assert max(obj.token_positions) < last
        covered = full_decode(tok, parsed.response_token_ids[first:last])
        assert parsed.text[slice(*obj.span)].strip("\ufffd") in covered or "\ufffd" in covered


def test_characters_split_over_tokens_are_put_together(tok):
    desc = "🐱 猫 naïve e\u0301"
    ids = encode_bytes(tok, serialize([BoxObject(desc, "bbox_2d", (1, 2, 3, 4))]))
    assert len(ids) > len(serialize([BoxObject(desc, "bbox_2d", (1, 2, 3, 4))])) - 4 * 10
    assert parse_rollout(ids, tok).objects[0].desc == unicodedata.normalize("NFC", desc)


def test_a_broken_character_decodes_as_the_tokenizer_decodes_it(tok):
    before = encode(tok, '{"objects": [{"desc": "')
    after = encode(tok, '", "bbox_2d": [<|coord_1|>, <|coord_2|>, <|coord_3|>, <|coord_4|>]}')
    broken = before + encode_bytes(tok, "🐱")[:2] + after
    parsed = parse_rollout(broken, tok)
    assert parsed.objects[0].desc == "\ufffd"
    assert parsed.objects[0].desc in full_decode(tok, broken)


@pytest.mark.parametrize(
    ("head", "unit"),
    [
        ("", "{"),  # braces that never close
        ("", "["),  # brackets that never close
        ("", ","),  # separators only
        ("", "}"),  # closing braces only
        ('"', '\\"'),  # a string of escaped quotes that never ends
        ('{"desc": "', '\\"'),  # the same inside a record
        ('{"desc": "', "🐱"),  # a desc that never ends
        ('{"desc": "cat", "poly": [', "<|coord_1|>, "),  # a polygon that never ends
        ("", "1, "),  # elements that are no objects
    ],
)
def test_a_long_pathological_rollout_is_read_in_linear_time(demo, head, unit):
    """100,000 repeats take a fraction of a second; a quadratic scan would take minutes."""
    ids = encode(demo, '{"objects": [' + head) + 100_000 * encode(demo, unit)
    start = time.thread_time()
    parsed = parse_rollout(ids, demo)
    positions = desc_token_positions(ids, demo)
    assert time.thread_time() - start < 10
    assert parsed.truncated
    assert parsed.prefix_text == '{"objects": ['
    assert (len(positions) >= 100_000) is ("desc" in head and "poly" not in head)


@pytest.mark.parametrize("make_ids", [lambda ids: tuple(ids), lambda ids: iter(ids)])
def test_any_iterable_of_ids_is_taken(demo, make_ids):
    ids = encode(demo, serialize([BoxObject("cat", "bbox_2d", (1, 2, 3, 4))]))
    assert parse_rollout(make_ids(ids), demo) == parse_rollout(ids, demo)


def test_numpy_ids_are_taken(demo):
    ids = encode(demo, serialize([BoxObject("cat", "bbox_2d", (1, 2, 3, 4))]))
    parsed = parse_rollout(np.array(ids), demo)
    assert parsed == parse_rollout(ids, demo)
    assert all(type(i) is int for i in parsed.prefix_token_ids)


def test_ids_outside_the_vocabulary_have_no_text(demo):
    ids = encode(demo, serialize([BoxObject("cat", "bbox_2d", (1, 2, 3, 4))]))
    padded = [len(demo) + 7, -1, *ids[:5], 2**40, *ids[5:]]
    parsed = parse_rollout(padded, demo)
    assert parsed.text == parse_rollout(ids, demo).text
    assert parsed.response_token_ids == padded
    assert as_boxes(parsed.objects) == [BoxObject("cat", "bbox_2d", (1, 2, 3, 4))]


def test_unknown_field_order_is_refused(demo):
    with pytest.raises(ConfigError, match=r"'geom_first', expected one of desc_first, geometry_first"):
        parse_rollout([], demo, field_order="geom_first")
