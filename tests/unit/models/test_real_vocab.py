"""Qwen's own vocabulary from its ranks, and the small model that carries it."""

from __future__ import annotations

import base64
import unicodedata

import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.codec.pieces import pieces_of
from coordexp.errors import ConfigError
from coordexp.models.real_vocab import merges_of, ranks_file, read_ranks
from coordexp.models.tiny import build_tiny_model
from coordexp.models.tiny_tokenizer import MARKUP_TOKENS, QWEN_SPLIT, SPECIAL_TOKENS


@pytest.fixture(scope="module")
def reference() -> tiktoken.Encoding:
    """The same ranks in an independent implementation of byte-pair encoding."""
    return tiktoken.Encoding(
        "qwen", pat_str=QWEN_SPLIT, mergeable_ranks=read_ranks(ranks_file()), special_tokens={}
    )


@pytest.fixture(scope="module")
def processor(real_model):
    return AutoProcessor.from_pretrained(real_model)


def test_special_and_markup_tokens_have_the_ids_of_qwens_checkpoints(real_tok):
    known = {
        "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652,
        "<|vision_end|>": 151653, "<|image_pad|>": 151655, "<|video_pad|>": 151656, "<tool_call>": 151657,
        "<think>": 151667, "</think>": 151668,
    }  # fmt: skip
    assert {text: real_tok.convert_tokens_to_ids(text) for text in known} == known
    texts = [*SPECIAL_TOKENS, *MARKUP_TOKENS]
    assert real_tok.encode("".join(texts)) == list(range(151643, 151669))
    assert real_tok.decode(range(151643, 151669), skip_special_tokens=True) == "".join(MARKUP_TOKENS)
    assert CoordVocab.from_tokenizer(real_tok).ids == tuple(range(151669, 152669))
    assert (real_tok.eos_token_id, real_tok.pad_token_id, real_tok.unk_token_id) == (151645, 151643, None)


def test_known_texts_have_the_ids_of_qwens_checkpoints(real_tok):
    assert real_tok.encode("Hello, world!") == [9707, 11, 1879, 0]
    assert real_tok.encode("<|im_start|>user\n") == [151644, 872, 198]
    assert real_tok.encode("<|im_start|>assistant\n") == [151644, 77091, 198]


@settings(max_examples=400, deadline=None)
@given(
    text=st.text(
        st.one_of(
            st.characters(exclude_categories=("Cs",)),
            st.sampled_from('{}[]":, \n\t\\abcdeé猫\u0301\u05d0\U0001f600\u200d0123'),
        ),
        max_size=60,
    )
)
def test_ids_are_those_of_an_independent_implementation(reference, real_tok, text):
    normal = unicodedata.normalize("NFC", text.replace("<", ""))  # the added tokens begin with it
    ids = real_tok.encode(text.replace("<", ""))
    assert ids == reference.encode(normal, disallowed_special=())
    assert pieces_of(real_tok).join(ids) == normal.encode()


def test_every_merge_joins_two_entries_and_ranks_are_in_order():
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"abc": 4, b"abcabc": 5}
    assert merges_of(ranks) == [("b", "c"), ("a", "bc"), ("abc", "abc")]
    with pytest.raises(ConfigError, match=r"no merge that makes b'abc'"):
        merges_of({b"a": 0, b"b": 1, b"c": 2, b"abc": 3})


def test_a_file_of_another_vocabulary_is_refused(tmp_path):
    path = tmp_path / "other.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(bytes([k])) + b" %d\n" % k for k in range(256)))
    with pytest.raises(ConfigError, match=r"other\.tiktoken: holds 256 ranks, expected 0\.\.151642"):
        read_ranks(path)
    path.write_text("no base64 at all\n")
    with pytest.raises(ConfigError, match=r"other\.tiktoken: is no tiktoken file"):
        read_ranks(path)


def test_a_saved_model_gives_the_same_tokens_in_tokenizer_and_processor(real_model, real_tok, processor):
    text = '{"objects": [{"desc": "naïve 猫 \U0001f600", "bbox_2d": [<|coord_0|>, <|coord_999|>]}]}<|im_end|>'
    loaded = AutoTokenizer.from_pretrained(real_model)
    assert type(loaded).__name__ == "Qwen2Tokenizer"
    assert loaded.encode(text) == processor.tokenizer.encode(text) == real_tok.encode(text)
    assert (loaded.eos_token, loaded.pad_token, len(loaded)) == ("<|im_end|>", "<|endoftext|>", 152669)


def test_shapes_of_the_model_are_qwens_in_vocabulary_patch_and_merge(real_model, real_plain_model):
    model = AutoModelForImageTextToText.from_pretrained(real_model)
    assert model.get_input_embeddings().num_embeddings == 152704
    assert AutoModelForImageTextToText.from_pretrained(real_plain_model).lm_head.weight.shape[0] == 151936
    vision = model.config.vision_config
    assert (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size) == (16, 2, 2)
    assert model.config.text_config.max_position_embeddings == 262144
    assert model.config.image_token_id == 151655
    assert sum(p.numel() for p in model.parameters()) < 12e6


@pytest.mark.parametrize(
    ("size", "grid"),
    [((640, 480), [1, 30, 40]), ((64, 64), [1, 16, 16]), ((33, 400), [1, 56, 6])],
    ids=["as it is", "enlarged to 65,536 pixels", "narrow"],
)
def test_images_get_the_grid_of_qwens_processor(processor, size, grid):
    found = processor.image_processor(images=[Image.new("RGB", size)], return_tensors="pt")
    assert found["image_grid_thw"].tolist() == [grid]


def test_a_prompt_with_a_picture_runs_through_the_model(real_model, processor):
    model = AutoModelForImageTextToText.from_pretrained(real_model)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Detect."}]}]
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    batch = processor(text=[prompt], images=[Image.new("RGB", (320, 256), "red")], return_tensors="pt")
    assert (batch["input_ids"] == 151655).sum() == 10 * 8
    with torch.no_grad():
        logits_BTV = model(**batch).logits
    assert logits_BTV.shape == (1, batch["input_ids"].shape[1], 152704)
    assert torch.isfinite(logits_BTV).all()


def test_a_corpus_and_the_real_vocabulary_exclude_each_other(tmp_path):
    with pytest.raises(ConfigError, match="Leave one of them out"):
        build_tiny_model(tmp_path / "m", preset="real-vocab", corpus=["cat"])
