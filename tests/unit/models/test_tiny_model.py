"""The tiny Qwen3-VL: what is on disk, how its tokenizer, template and processor behave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.errors import ConfigError
from coordexp.models.tiny import PRESETS, build_tiny_model
from coordexp.models.tiny_tokenizer import MARKUP_TOKENS, SPECIAL_TOKENS

DETECTION = (
    '{"objects": [{"desc": "red box", "bbox_2d": [<|coord_0|>, <|coord_5|>, <|coord_50|>, <|coord_999|>]}]}'
)


@pytest.fixture(scope="module")
def nano_dir(tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("models") / "nano"
    assert build_tiny_model(output_dir, preset="nano")
    return output_dir


@pytest.fixture(scope="module")
def processor(nano_dir):
    return AutoProcessor.from_pretrained(nano_dir)


@pytest.fixture(scope="module")
def tokenizer(processor):
    return processor.tokenizer


def test_coordinate_tokens_are_contiguous_single_ids_and_survive_decoding(tokenizer):
    vocab = CoordVocab.from_tokenizer(tokenizer)
    assert vocab.ids == tuple(range(vocab.ids[0], vocab.ids[0] + 1000))
    assert vocab.ids[-1] == len(tokenizer) - 1
    ids = tokenizer.encode(DETECTION + "<|im_end|>", add_special_tokens=False)
    assert tokenizer.decode(ids) == DETECTION + "<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == DETECTION


def test_qwen_tokens_are_single_ids_in_qwens_order(tokenizer):
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in (*SPECIAL_TOKENS, *MARKUP_TOKENS)]
    first = ids[0][0]
    assert ids == [[first + k] for k in range(len(ids))]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.decode([i for [i] in ids], skip_special_tokens=True) == "".join(MARKUP_TOKENS)


@pytest.mark.parametrize(
    "text",
    [
        "e\u0301 is not \u00e9",  # decomposed and composed accents stay apart: no normalizer
        "\ufb01 \u212b",  # compatibility characters
        "\U0001f9d1\u200d\U0001f680 \u65e5\u672c\u8a9e",  # joined emoji, CJK
        "\x00\r\n\t  \u2028 end ",
    ],
)
def test_tokenizer_round_trips_text_that_normalizers_change(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_tokenizer_round_trips_any_unicode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_merge_can_join_a_quote_with_the_word_behind_it(tokenizer):
    """Qwen's pre-tokenizer allows it, and span logic has to cope with it."""
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode('{"desc": "a"}', add_special_tokens=False)]
    assert "".join(pieces) == '{"desc": "a"}'
    assert '":' in pieces


def test_chat_template_renders_the_turns_of_qwen(processor):
    messages = [
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Detect."}]},
        {"role": "assistant", "content": [{"type": "text", "text": '{"objects": []}'}]},
    ]
    rendered = processor.apply_chat_template(messages, tokenize=False)
    assert rendered == (
        "<|im_start|>system\nBe exact.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Detect.<|im_end|>\n"
        '<|im_start|>assistant\n{"objects": []}<|im_end|>\n'
    )
    prompt = processor.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert rendered.startswith(prompt)
    assert prompt.endswith("<|im_start|>assistant\n")


def test_tool_turns_are_folded_into_one_user_turn(processor):
    messages = [{"role": "tool", "content": "a"}, {"role": "tool", "content": "b"}]
    assert processor.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>user\n<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response><|im_end|>\n"
    )


@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 48), (32, 32), (128, 96)])
def test_images_with_sides_in_multiples_of_16_are_not_resized(processor, width, height):
    rng = np.random.default_rng(0)
    pixels_HWC = rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    out = processor.image_processor(images=[Image.fromarray(pixels_HWC)], return_tensors="pt")
    assert out["image_grid_thw"].tolist() == [[1, height // 8, width // 8]]
    top_left_patch = out["pixel_values"][0].reshape(3, 2, 8, 8)  # channel, frame, y, x
    expected_CHW = torch.from_numpy(pixels_HWC[:8, :8] / 255.0 * 2 - 1).permute(2, 0, 1).float()
    torch.testing.assert_close(top_left_patch[:, 0], expected_CHW, atol=1e-6, rtol=0)
    torch.testing.assert_close(top_left_patch[:, 1], expected_CHW, atol=1e-6, rtol=0)


def test_model_reads_an_image_and_generates_within_its_vocabulary(nano_dir, processor):
    model = AutoModelForImageTextToText.from_pretrained(nano_dir)
    prompt = "<|vision_start|><|image_pad|><|vision_end|>Detect."
    images = [Image.new("RGB", (64, 64), color) for color in ("white", "black")]
    batch = processor(text=[prompt, prompt], images=images, return_tensors="pt")
    assert (batch["input_ids"][0] == model.config.image_token_id).sum() == 16  # 8 x 8 patches, merged 2 x 2
    with torch.no_grad():
        logits_BTV = model(**batch).logits
        generated = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert logits_BTV.shape[-1] == 1536  # padded to a multiple of 64
    assert not torch.allclose(logits_BTV[0, -1], logits_BTV[1, -1])  # the picture matters
    assert generated.shape[1] <= batch["input_ids"].shape[1] + 3
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_config_takes_its_token_ids_from_the_tokenizer(nano_dir, tokenizer):
    model = AutoModelForImageTextToText.from_pretrained(nano_dir)
    id_of = tokenizer.convert_tokens_to_ids
    assert model.config.image_token_id == id_of("<|image_pad|>")
    assert model.config.video_token_id == id_of("<|video_pad|>")
    assert model.config.vision_start_token_id == id_of("<|vision_start|>")
    assert model.config.vision_end_token_id == id_of("<|vision_end|>")
    assert model.generation_config.eos_token_id == [id_of("<|im_end|>"), id_of("<|endoftext|>")]
    assert model.config.model_type == "qwen3_vl"


def test_same_arguments_give_the_same_bytes_and_other_seeds_other_weights(nano_dir, tmp_path):
    torch.manual_seed(123)  # the builder neither reads nor moves the caller's random state
    before = torch.random.get_rng_state()
    build_tiny_model(tmp_path / "again", preset="nano")
    build_tiny_model(tmp_path / "other", preset="nano", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    names = {path.name for path in nano_dir.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (nano_dir / name).read_bytes(), name
    weights, other = ((d / "model.safetensors").read_bytes() for d in (nano_dir, tmp_path / "other"))
    assert weights != other
    assert (tmp_path / "other" / "tokenizer.json").read_bytes() == (nano_dir / "tokenizer.json").read_bytes()


def test_rerun_is_up_to_date_and_other_arguments_are_refused(tmp_path):
    assert build_tiny_model(tmp_path / "m", preset="nano") is True
    assert build_tiny_model(tmp_path / "m", preset="nano") is False
    with pytest.raises(ConfigError, match=r"seed: 0 there, 7 asked for.*--force"):
        build_tiny_model(tmp_path / "m", preset="nano", seed=7)
    assert build_tiny_model(tmp_path / "m", preset="nano", seed=7, force=True) is True
    assert build_tiny_model(tmp_path / "m", preset="nano", seed=7) is False


def test_force_never_replaces_a_directory_of_something_else(tmp_path):
    (tmp_path / "precious.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="not empty"):
        build_tiny_model(tmp_path, preset="nano", force=True)
    assert (tmp_path / "precious.txt").read_text() == "keep me"
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_unknown_preset_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"preset 'huge': expected one of demo, nano, real-vocab"):
        build_tiny_model(tmp_path / "m", preset="huge")
    assert not (tmp_path / "m").exists()


def test_corpus_decides_the_merges(tmp_path):
    build_tiny_model(tmp_path / "m", preset="nano", corpus=["zyzzyva zyzzyva zyzzyva"] * 3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert len(tokenizer.encode("zyzzyva", add_special_tokens=False)) == 1
    assert len(tokenizer.encode("object", add_special_tokens=False)) == 6


def test_without_coordinate_tokens_the_vocabulary_lookup_says_how_to_add_them(tmp_path):
    build_tiny_model(tmp_path / "m", preset="nano", coord_tokens=False)
    with pytest.raises(ConfigError, match="coordexp model add-coord-tokens"):
        CoordVocab.from_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "m"))


def test_preset_sizes_are_consistent():
    for size in PRESETS.values():
        assert size.vision_hidden % size.vision_heads == 0
        assert size.text_heads % size.text_kv_heads == 0
        assert int(size.num_position_embeddings**0.5) ** 2 == size.num_position_embeddings
