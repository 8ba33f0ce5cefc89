"""Token types and desc positions of supervised sequences."""

from __future__ import annotations

import random

import numpy as np
import pytest
from codec_fuzz import mutate_ids, random_objects, random_rollout
from codec_tokenizers import ENCODERS, encode, encode_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.codec.parse import TokenType, desc_token_positions, parse_rollout, token_types
from coordexp.codec.pieces import pieces_of
from coordexp.codec.schema import BoxObject
from coordexp.codec.serialize import serialize

BOX = "[<|coord_1|>, <|coord_2|>, <|coord_3|>, <|coord_4|>]"


def desc_bytes(tok, text):
    """The desc positions of a text with one token per byte, as the text they cover."""
    ids = encode_bytes(tok, text)
    return pieces_of(tok).join(ids[i] for i in desc_token_positions(ids, tok)).decode()


def test_types_of_a_small_sequence(demo):
    ids = encode(demo, f'{{"objects": [{{"desc": "red box", "bbox_2d": {BOX}}}]}}<|im_end|>')
    by_type = {
        kind: [demo.decode([i]) for i, t in zip(ids, token_types(ids, demo), strict=True) if t == kind]
        for kind in TokenType
    }
    assert by_type[TokenType.IGNORE] == []
    assert by_type[TokenType.COORD] == ["<|coord_1|>", "<|coord_2|>", "<|coord_3|>", "<|coord_4|>"]
    assert by_type[TokenType.EOS] == ["<|im_end|>"]
    # a quote that is merged with a word of the desc counts as desc
    assert "".join(by_type[TokenType.DESC]).strip('",') == "red box"
    struct = "".join(by_type[TokenType.STRUCT])
    assert struct.startswith('{"objects": [{"desc":')
    assert struct.endswith("]}]}")


def test_types_are_small_ints(demo):
    types = token_types(encode(demo, serialize([])), demo)
    assert types.dtype == np.int8
    assert token_types([], demo).shape == (0,)
    assert (TokenType.IGNORE, TokenType.STRUCT, TokenType.DESC, TokenType.COORD, TokenType.EOS) == (
        0,
        1,
        2,
        3,
        4,
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"objects": []}', ""),  # nothing to find
        (f'{{"objects": [{{"desc": "cat", "bbox_2d": {BOX}}}]}}', "cat"),  # the inside, without the quotes
        (f'{{"objects": [{{"bbox_2d": {BOX}, "desc": "cat"}}]}}', "cat"),  # geometry first
        (f'{{"objects": [{{"desc" :\n"cat", "bbox_2d": {BOX}}}]}}', "cat"),  # whitespace around the colon
        (f'{{"objects": [{{"desc": "", "bbox_2d": {BOX}}}]}}', ""),  # an empty desc has no inside
        ('{"objects": [{"desc": "a\\"b\\\\"}, {"desc": "c"}]}', 'a\\"b\\\\c'),  # escapes belong to it
        ('{"objects": [{"desc": "猫 🐱"}]}', "猫 🐱"),  # characters of several bytes
        (
            '{"objects": [{"desc": "\\"desc\\": \\"x"}]}',
            '\\"desc\\": \\"x',
        ),  # a desc that looks like a member
        ('{"objects": [{"note": "desc", "desc": "a"}]}', "a"),  # the word as a value is no key
        ('{"objects": [{"desc": ["x"], "desc": "a"}]}', "a"),  # a desc that is no string
        ('{"objects": [{"desc": "a"}, {"desc": "cut of', "acut of"),  # a cut record
        ('{"objects": [{"desc": "cut\\', "cut"),  # cut inside an escape
    ],
)
def test_desc_values(tok, text, expected):
    assert desc_bytes(tok, text) == expected


def test_nothing_after_the_end_of_the_turn_is_desc(tok):
    ids = encode(tok, '{"objects": [{"desc": "a"}]}<|im_end|>{"desc": "b"}')
    im_end = ids.index(tok.convert_tokens_to_ids("<|im_end|>"))
    assert desc_token_positions(ids, tok) == desc_token_positions(ids[:im_end], tok) != []


def test_a_desc_that_holds_im_end_as_text_stays_desc(tok):
    text = serialize([BoxObject("<|im_end|>", "bbox_2d", (1, 2, 3, 4))])
    assert desc_bytes(tok, text) == r"\u003c|im_end|>"
    assert TokenType.EOS not in token_types(encode(tok, text), tok)


def test_a_token_over_two_descs_is_given_once(fused):
    bridge = encode(fused, 'k"}, {"desc": "k')
    assert len(bridge) == 1
    ids = encode(fused, '{"objects": [{"desc": "a') + bridge + encode(fused, 'b"}]}')
    positions = desc_token_positions(ids, fused)
    at = ids.index(bridge[0])
    assert positions == sorted(set(positions))
    assert {at - 1, at, at + 1} <= set(positions)


def test_a_coordinate_token_inside_a_desc_is_a_coordinate(tok):
    ids = encode(tok, f'{{"objects": [{{"desc": "a<|coord_9|>", "bbox_2d": {BOX}}}]}}')
    types = token_types(ids, tok)
    assert (types == TokenType.COORD).sum() == 5
    assert ids.index(tok.convert_tokens_to_ids("<|coord_9|>")) in desc_token_positions(ids, tok)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), encoder=st.sampled_from(list(ENCODERS)))
def test_types_of_a_target_partition_it_by_the_objects(tok, seed, encoder):
    rng = random.Random(seed)
    field_order = rng.choice(["desc_first", "geometry_first"])
    objects = random_objects(rng, rng.randint(0, 5))
    ids = ENCODERS[encoder](tok, serialize(objects, field_order)) + encode(tok, "<|im_end|>")
    types = token_types(ids, tok)
    pieces = pieces_of(tok)
    assert [pieces.coord_vocab.bin_of(ids[i]) for i in np.flatnonzero(types == TokenType.COORD)] == [
        k for obj in objects for k in obj.bins
    ]
    assert np.flatnonzero(types == TokenType.EOS).tolist() == [len(ids) - 1]
    # independent reference: each token's byte range against each object's desc range
    text = serialize(objects, field_order)
    starts = np.cumsum([0, *(len(pieces[i]) for i in ids)])
    expected = set()
    for obj in parse_rollout(ids, tok).objects:
        start, stop = (len(text[:at].encode()) for at in obj.desc_span)
        expected |= {i for i in range(len(ids)) if starts[i] < stop and starts[i + 1] > start}
    assert set(np.flatnonzero(types == TokenType.DESC)) == expected
    assert desc_token_positions(ids, tok) == sorted(expected)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_faulty_sequences_have_types_too(tok, seed):
    rng = random.Random(seed)
    ids = mutate_ids(rng, random_rollout(rng, tok), 2, len(tok) + 10)
    positions = desc_token_positions(ids, tok)
    assert positions == sorted(set(positions))
    assert set(positions) <= set(range(len(ids)))
    types = token_types(ids, tok)
    assert types.shape == (len(ids),)
    assert TokenType.IGNORE not in types
