"""A randomly initialised Qwen3-VL of any small size that loads like a hub checkpoint.

    coordexp model tiny --output runs/models/tiny --preset demo

The directory holds config, safetensors weights, tokenizer, processor and chat template, so that
`AutoModelForImageTextToText`, `AutoProcessor` and ms-swift (model_type qwen3_vl) take it as it is.
Presets: `demo` (2.8M parameters) learns synthetic 64 px scenes on a CPU in minutes; `nano` (0.1M) is for
tests. `real-vocab` (10M) has Qwen3-VL's own vocabulary, image sizes and position range with two small layers: what
works on it works on a user's checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import torch
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from coordexp.errors import ConfigError
from coordexp.models.real_vocab import NUM_ROWS, real_tokenizer
from coordexp.models.staging import is_up_to_date, staged_directory, write_stamp
from coordexp.models.tiny_tokenizer import CHAT_TEMPLATE, train_tiny_tokenizer

STAMP_NAME = "coordexp_tiny_model.json"
TEMPORAL_PATCH_SIZE = 2  # as in every Qwen3-VL: a still image is its frame twice
SPATIAL_MERGE_SIZE = 2  # 2 x 2 patches become one visual token
MIN_IMAGE_TOKENS, MAX_IMAGE_TOKENS = 4, 16384  # the limits qwen-vl-utils applies, so nobody resizes
QWEN_MIN_IMAGE_TOKENS = 64  # smaller images are enlarged by the processor of Qwen3-VL checkpoints


@dataclass(frozen=True, kw_only=True)
class TinyModelSize:
    """Sizes of the two towers. `text_head_dim` is a multiple of 16 (three rotary sections share it)."""

    text_hidden: int
    text_intermediate: int
    text_layers: int
    text_heads: int
    text_kv_heads: int
    text_head_dim: int
    vision_hidden: int
    vision_intermediate: int
    vision_depth: int
    vision_heads: int
    patch_size: int = 8
    num_position_embeddings: int = 64
    vocab_multiple: int = 64
    min_vocab_rows: int = 0
    real_vocab: bool = False
    """Qwen's own vocabulary instead of one trained on detection text."""
    tied: bool = True
    """Whether embedding and output head are one matrix."""
    min_image_tokens: int = MIN_IMAGE_TOKENS
    max_positions: int = 4096
    rope_theta: float = 10000.0


PRESETS: dict[str, TinyModelSize] = {
    "demo": TinyModelSize(
        text_hidden=160, text_intermediate=512, text_layers=4,
        text_heads=5, text_kv_heads=5, text_head_dim=32,
        vision_hidden=128, vision_intermediate=256, vision_depth=3, vision_heads=4,
    ),
    "nano": TinyModelSize(
        text_hidden=32, text_intermediate=64, text_layers=2,
        text_heads=2, text_kv_heads=1, text_head_dim=32,
        vision_hidden=32, vision_intermediate=64, vision_depth=1, vision_heads=2,
    ),
    "real-vocab": TinyModelSize(
        text_hidden=64, text_intermediate=128, text_layers=2,
        text_heads=2, text_kv_heads=1, text_head_dim=32,
        vision_hidden=64, vision_intermediate=128, vision_depth=2, vision_heads=2,
        patch_size=16, num_position_embeddings=2304, min_vocab_rows=NUM_ROWS, real_vocab=True,
        min_image_tokens=QWEN_MIN_IMAGE_TOKENS, max_positions=262144, rope_theta=5e6,
    ),
}  # fmt: skip


def build_tiny_model(
    output_dir: str | Path,
    *,
    preset: str = "demo",
    size: TinyModelSize | None = None,
    seed: int = 0,
    corpus: Iterable[str] | None = None,
    coord_tokens: bool = True,
    force: bool = False,
) -> bool:
    """Write a tiny Qwen3-VL to `output_dir`; the same arguments give the same bytes.

    Args:
        preset: a name in `PRESETS`; `size` overrides it.
        seed: of the random weights.
        corpus: lines to train the tokenizer on; None takes the built-in detection text. Not with the real vocabulary.
        coord_tokens: whether the tokenizer holds the 1000 coordinate tokens.
        force: replace a tiny model made from other arguments.

    Returns:
        True if the model was written, False if `output_dir` already holds exactly this model.

    Raises:
        ConfigError: unknown preset, `output_dir` holds something else, or the real vocabulary is not installed.
    """
    output_dir = Path(output_dir)
    size = size or _preset(preset)
    if size.real_vocab and corpus is not None:
        raise ConfigError(
            "--corpus trains a vocabulary, but this preset has Qwen's own. Leave one of them out."
        )
    corpus = None if corpus is None else list(corpus)
    stamp = {
        "generator": "coordexp.models.tiny/4",
        "size": asdict(size),
        "seed": seed,
        "coord_tokens": coord_tokens,
        "corpus": "built-in" if corpus is None else sha256("\n".join(corpus).encode()).hexdigest(),
    }
    if not force and is_up_to_date(output_dir, STAMP_NAME, stamp):
        return False
    replace = force and (output_dir / STAMP_NAME).is_file()
    with staged_directory(output_dir, replace=replace) as staging_dir:
        tokenizer = _tokenizer(size, corpus, coord_tokens=coord_tokens)
        config = tiny_config(size, tokenizer)
        model = _init_model(config, tokenizer, seed=seed)
        model.save_pretrained(staging_dir)
        tiny_processor(size, tokenizer).save_pretrained(staging_dir)
        write_stamp(staging_dir, STAMP_NAME, stamp)
    return True


def tiny_config(size: TinyModelSize, tokenizer: PreTrainedTokenizerBase) -> Qwen3VLConfig:
    """The model configuration for `size`; media and stop token ids come from `tokenizer`."""

    def id_of(token: str) -> int:
        found = tokenizer.convert_tokens_to_ids(token)
        assert isinstance(found, int)
        return found

    padded = -(-len(tokenizer) // size.vocab_multiple) * size.vocab_multiple
    vocab_size = max(padded, size.min_vocab_rows)
    return Qwen3VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": size.text_hidden,
            "intermediate_size": size.text_intermediate,
            "num_hidden_layers": size.text_layers,
            "num_attention_heads": size.text_heads,
            "num_key_value_heads": size.text_kv_heads,
            "head_dim": size.text_head_dim,
            "initializer_range": round(size.text_hidden**-0.5, 4),  # 0.02 would starve words in a tiny model
            "max_position_embeddings": size.max_positions,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": size.rope_theta,
                "mrope_section": _mrope_section(size.text_head_dim),
                "mrope_interleaved": True,
            },
            "bos_token_id": id_of("<|endoftext|>"),
            "eos_token_id": id_of("<|im_end|>"),
            "pad_token_id": id_of("<|endoftext|>"),
            "tie_word_embeddings": size.tied,
            "dtype": "float32",
        },
        vision_config={
            "depth": size.vision_depth,
            "hidden_size": size.vision_hidden,
            "intermediate_size": size.vision_intermediate,
            "num_heads": size.vision_heads,
            "out_hidden_size": size.text_hidden,
            "initializer_range": 0.02,  # larger values slow down learning of shapes
            "patch_size": size.patch_size,
            "num_position_embeddings": size.num_position_embeddings,
            "deepstack_visual_indexes": [size.vision_depth // 2],
            "spatial_merge_size": SPATIAL_MERGE_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
            "dtype": "float32",
        },
        image_token_id=id_of("<|image_pad|>"),
        video_token_id=id_of("<|video_pad|>"),
        vision_start_token_id=id_of("<|vision_start|>"),
        vision_end_token_id=id_of("<|vision_end|>"),
        tie_word_embeddings=size.tied,
        dtype="float32",
    )


def tiny_processor(size: TinyModelSize, tokenizer: PreTrainedTokenizerBase) -> Qwen3VLProcessor:
    """Image, video and text processor; sides that are multiples of `2 * patch_size` px stay as they are."""
    pixels_per_token = (size.patch_size * SPATIAL_MERGE_SIZE) ** 2
    vision = {
        "patch_size": size.patch_size,
        "merge_size": SPATIAL_MERGE_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "size": {
            "shortest_edge": size.min_image_tokens * pixels_per_token,
            "longest_edge": MAX_IMAGE_TOKENS * pixels_per_token,
        },
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**vision),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**vision),
        chat_template=CHAT_TEMPLATE,
    )


def _tokenizer(
    size: TinyModelSize, corpus: Iterable[str] | None, *, coord_tokens: bool
) -> PreTrainedTokenizerBase:
    if size.real_vocab:
        return real_tokenizer(coord_tokens=coord_tokens)
    return train_tiny_tokenizer(corpus=corpus, coord_tokens=coord_tokens)


def _preset(name: str) -> TinyModelSize:
    if name not in PRESETS:
        raise ConfigError(f"model preset {name!r}: expected one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def _mrope_section(head_dim: int) -> list[int]:
    """Split head_dim/2 rotary frequencies over time, height and width; time takes what is left over."""
    spatial = head_dim // 2 // 3
    return [head_dim // 2 - 2 * spatial, spatial, spatial]


def _init_model(
    config: Qwen3VLConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> Qwen3VLForConditionalGeneration:
    """Random float32 weights from `seed`; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Qwen3VLForConditionalGeneration = Qwen3VLForConditionalGeneration(config).float().eval()
    generation = model.generation_config
    generation.eos_token_id = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    generation.pad_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    return model
