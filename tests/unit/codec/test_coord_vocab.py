"""Coordinate tokens of a tokenizer: 1000 single ids in bin order, or an error that says what to do."""

from __future__ import annotations

import random

import pytest
from codec_tokenizers import with_added_tokens
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from coordexp.codec.coord_vocab import COORD_TOKENS, CoordVocab, coord_token, coord_token_bin
from coordexp.errors import ConfigError


def byte_bpe(**model_options):
    bpe = Tokenizer(models.BPE(**model_options))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    return bpe


def added(tokens, **options):
    return [AddedToken(token, special=False, **{"normalized": False, **options}) for token in tokens]


def test_ids_are_in_bin_order(tok):
    vocab = CoordVocab.from_tokenizer(tok)
    assert len(vocab.ids) == len(set(vocab.ids)) == 1000
    for k in (0, 1, 9, 10, 99, 100, 999):
        assert tok.convert_ids_to_tokens(vocab.ids[k]) == vocab.token(k) == f"<|coord_{k}|>"
        assert vocab.bin_of(vocab.ids[k]) == k
    assert vocab.bin_of(tok.convert_tokens_to_ids("<|im_end|>")) is None
    assert vocab.bin_of(-1) is None


def test_ids_need_not_be_contiguous_or_ascending():
    tokens = [*COORD_TOKENS, "<|filler_a|>", "<|filler_b|>"]
    random.Random(0).shuffle(tokens)
    tok = with_added_tokens(byte_bpe(), added(tokens))
    vocab = CoordVocab.from_tokenizer(tok)
    assert list(vocab.ids) != sorted(vocab.ids)
    assert [tok.convert_ids_to_tokens(i) for i in vocab.ids] == list(COORD_TOKENS)


def test_missing_tokens_are_counted_and_named():
    missing = {"<|coord_7|>", "<|coord_512|>", "<|coord_999|>"}
    tok = with_added_tokens(byte_bpe(), added(t for t in COORD_TOKENS if t not in missing))
    with pytest.raises(ConfigError) as error:
        CoordVocab.from_tokenizer(tok)
    message = str(error.value)
    assert "lacks 3 of 1000" in message
    assert all(token in message for token in missing)
    assert "coordexp model add-coord-tokens --model DIR --output DIR" in message


def test_a_tokenizer_without_any_says_so():
    with pytest.raises(ConfigError, match=r"lacks 1000 of 1000 .*<\|coord_0\|>.*<\|coord_999\|>"):
        CoordVocab.from_tokenizer(with_added_tokens(byte_bpe(), []))


def test_the_unknown_token_is_no_coordinate_token():
    tok = with_added_tokens(byte_bpe(unk_token="<unk>"), added(COORD_TOKENS[:-1]), unk_token="<unk>")
    assert tok.convert_tokens_to_ids("<|coord_999|>") == tok.unk_token_id is not None
    with pytest.raises(ConfigError, match=r"lacks 1 of 1000 coordinate tokens \(<\|coord_999\|>\)"):
        CoordVocab.from_tokenizer(tok)


def test_a_vocabulary_entry_that_encoding_splits_is_refused():
    """The token has an id, but is no added token, so its text never becomes that id."""
    vocab = byte_bpe().get_vocab()
    vocab["<|coord_3|>"] = len(vocab)
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok = with_added_tokens(bpe, added(t for t in COORD_TOKENS if t != "<|coord_3|>"))
    assert tok.convert_ids_to_tokens(tok.convert_tokens_to_ids("<|coord_3|>")) == "<|coord_3|>"
    with pytest.raises(ConfigError, match=r"1 coordinate tokens .* not encode as one id \(<\|coord_3\|>\)"):
        CoordVocab.from_tokenizer(tok)


def test_tokens_that_swallow_the_space_before_them_are_refused():
    tok = with_added_tokens(byte_bpe(), added(COORD_TOKENS, lstrip=True))
    first, comma, second = tok.encode("<|coord_0|>, <|coord_1|>")
    assert tok.decode([first, comma, second]) == "<|coord_0|>,<|coord_1|>"
    with pytest.raises(ConfigError, match="changes the text around coordinate tokens"):
        CoordVocab.from_tokenizer(tok)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|coord_0|>", 0),
        ("<|coord_999|>", 999),
        ("<|coord_1000|>", None),  # no such bin
        ("<|coord_07|>", None),  # leading zero
        ("<|coord_-1|>", None),  # negative
        ("<|coord_٣|>", None),  # a digit that is not ASCII
        (" <|coord_1|>", None),  # a space beside it
        ("<|coord_1|>\n", None),  # a newline after it
        ("1", None),  # a bare number
    ],
)
def test_coord_token_bin(text, expected):
    assert coord_token_bin(text) == expected


@pytest.mark.parametrize("bin_index", [-1, 1000])
def test_no_token_outside_the_bins(bin_index):
    with pytest.raises(ConfigError, match=f"bin {bin_index}: expected 0..999"):
        coord_token(bin_index)
