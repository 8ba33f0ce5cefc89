"""Token ids -> bytes: the same text as the tokenizer's own decode, with exact token boundaries."""

from __future__ import annotations

import gc
import weakref

import pytest
from codec_tokenizers import encode, make_demo, make_fused, with_added_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from coordexp.codec import pieces as pieces_module
from coordexp.codec.pieces import DecodedTokens, pieces_of, token_names
from coordexp.errors import ConfigError, RolloutError
from coordexp.models.tiny_tokenizer import train_tiny_tokenizer


def full_decode(tok, ids):
    return tok.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_every_token_alone_decodes_as_the_tokenizer_decodes_it(tok):
    pieces = pieces_of(tok)
    for token_id in range(len(tok)):
        assert pieces[token_id].decode("utf-8", errors="replace") == full_decode(tok, [token_id])


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_token_list_decodes_as_the_tokenizer_decodes_it(tok, data):
    ids = data.draw(st.lists(st.integers(0, len(tok) - 1), max_size=30))
    assert pieces_of(tok).join(ids).decode("utf-8", errors="replace") == full_decode(tok, ids)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_texts_of_tokens_are_the_full_decode_in_parts(tok, data):
    ids = data.draw(st.lists(st.integers(0, len(tok) - 1), max_size=30))
    texts = pieces_of(tok).texts(ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == full_decode(tok, ids)


def test_a_character_of_several_tokens_stands_with_the_last_of_them(demo):
    ids = encode(demo, "a猫!")
    assert pieces_of(demo).texts(ids) == ["a", "", "", "猫", "!"]
    assert pieces_of(demo).texts(ids[:3]) == ["a", "", "\ufffd"]


def test_added_tokens_outside_the_byte_alphabet_are_their_own_text():
    tok = make_demo()
    tok.add_tokens([AddedToken("grüner Kreis"), AddedToken("猫")])
    ids = encode(tok, "grüner Kreis 猫")
    assert len(ids) == 3
    assert pieces_of(tok).join(ids).decode() == "grüner Kreis 猫" == full_decode(tok, ids)


def test_tokens_added_later_are_seen():
    tok = make_demo()
    pieces = pieces_of(tok)
    new_id = len(tok)
    assert pieces[new_id] == b""
    tok.add_tokens(["<|late|>"])
    assert pieces_of(tok)[new_id] == b"<|late|>"


def test_two_tokenizers_are_never_confused_and_none_is_kept_alive():
    first, second = make_demo(), make_fused()
    assert pieces_of(first) is pieces_of(first)
    assert pieces_of(first) is not pieces_of(second)
    gone = weakref.ref(first)
    gc.collect()  # tokenizers that other tests left behind
    cached_before = len(pieces_module._PIECES)
    pieces_of(first).join(range(len(first)))
    del first
    gc.collect()
    assert gone() is None
    assert len(pieces_module._PIECES) == cached_before - 1


def test_a_tokenizer_that_is_no_byte_level_bpe_is_refused():
    chars = {char: n for n, char in enumerate('{"objects": [,]} ')}
    tok = Tokenizer(models.BPE(vocab=chars, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    with pytest.raises(ConfigError, match=r"expected a byte-level BPE"):
        pieces_of(with_added_tokens(tok))


def test_a_tokenizer_without_coordinate_tokens_is_refused_each_time():
    tok = train_tiny_tokenizer(coord_tokens=False)
    for _ in range(2):
        with pytest.raises(ConfigError, match="lacks 1000 of 1000"):
            _ = pieces_of(tok).coord_vocab


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=20), data=st.data())
def test_a_cut_keeps_exactly_the_bytes_before_it(tok, text, data):
    pieces = pieces_of(tok)
    ids = encode(tok, '"}, {"' + text + "]}]}12, 7]")
    tokens = DecodedTokens.from_ids(ids, pieces)
    offset = data.draw(st.integers(0, len(tokens.data)))
    cut = tokens.cut(offset, pieces)
    assert cut.data == pieces.join(cut.ids) == tokens.data[:offset]
    assert cut == DecodedTokens.from_ids(cut.ids, pieces)
    num_whole = sum(end <= offset for end in tokens.ends)
    assert cut.ids[:num_whole] == ids[:num_whole]


def test_tokens_over_a_byte_range(demo):
    pieces = pieces_of(demo)
    ids = [pieces.encode_exactly(b"ab")[0], *pieces.encode_exactly(b"c"), *pieces.encode_exactly(b"de")]
    tokens = DecodedTokens.from_ids(ids, pieces)
    ends = tokens.ends
    for start in range(len(tokens.data)):
        for stop in range(start + 1, len(tokens.data) + 1):
            over = [i for i, end in enumerate(ends) if end > start and tokens.start_of(i) < stop]
            assert list(range(*tokens.tokens_over(start, stop))) == over
    assert tokens.tokens_over(1, 1)[0] == tokens.tokens_over(1, 1)[1]


def test_bytes_that_are_no_text_are_encoded_byte_by_byte(tok):
    pieces = pieces_of(tok)
    for data in (b"\x9f", b"\xf0\x9f", b"\xb1\x22}"):
        assert pieces.join(pieces.encode_exactly(data)) == data


def test_bytes_without_a_token_are_an_error():
    symbols = sorted(set('<|coord_0123456789|>im_end{"objects": [').union("Ġ") - {" "})
    bpe = Tokenizer(models.BPE(vocab={symbol: n for n, symbol in enumerate(symbols)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.add_tokens(["<|im_end|>", ", ", *(f"<|coord_{k}|>" for k in range(1000))])
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe)
    with pytest.raises(RolloutError, match=r"no tokens for the bytes b'\}'"):
        pieces_of(tok).encode_exactly(b"}")


def test_an_id_that_is_no_token_is_named_by_its_number(tok):
    known = encode(tok, '{"objects"')
    names = tok.convert_ids_to_tokens(known)
    assert token_names(tok, [*known, len(tok) + 5, known[0]]) == [*names, f"<id {len(tok) + 5}>", names[0]]
