"""A small byte-level BPE tokenizer with Qwen's special tokens and, on request, the 1000 coordinate tokens.

It splits text with Qwen's own regular expression and stores Qwen3-VL's chat template, so that it behaves
like the real tokenizer in everything but size: merges join a quote with the word after it (`"red`),
accents and emoji fall apart into bytes, coordinate tokens are single ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from coordexp.codec.coord_vocab import COORD_TOKENS

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
"""Qwen3-VL's special tokens, in the order of their ids."""

MARKUP_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
"""The added tokens of Qwen3-VL that decoding keeps in the text (special=False)."""

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2/Qwen3's pre-tokenization pattern."""

# The structure of Qwen3-VL's chat template: system turn, user turns with image and video placeholders,
# assistant turns, tool turns folded into user turns, optional generation prompt.
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type == 'video' or 'video' in part -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif 'text' in part -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if message.role in ['system', 'user', 'assistant'] -%}
        {{- '<|im_start|>' + message.role + '\\n' + render(message.content) + '<|im_end|>\\n' -}}
    {%- elif message.role == 'tool' -%}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}
            {{- '<|im_start|>user' -}}
        {%- endif -%}
        {{- '\\n<tool_response>\\n' + render(message.content) + '\\n</tool_response>' -}}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}
            {{- '<|im_end|>\\n' -}}
        {%- endif -%}
    {%- else -%}
        {{- raise_exception('Unexpected message role: ' + message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "black", "white", "gray", "pink")
_SHAPES = ("box", "circle", "ellipse", "triangle", "diamond", "cross")
_ENGLISH = (
    "Detect all objects in the image and answer with JSON.",
    "Locate every object. Report a short description and a bounding box for each object you see.",
    "You are a helpful assistant that writes object detections as text.",
    "The image shows a red box and a blue circle on a light background.",
    "system user assistant person car dog cat chair table bottle book cup bird",
)


def default_corpus() -> Iterator[str]:
    """Lines of detection text and plain English that the tiny tokenizer is trained on."""
    for color in _COLORS:
        for shape in _SHAPES:
            yield f'{{"objects": [{{"desc": "{color} {shape}", "bbox_2d": [1, 2, 3, 4]}}]}}'
            yield f'{{"objects": [{{"bbox_2d": [1, 2, 3, 4], "desc": "{color} {shape}"}}, {{"desc": "x"}}]}}'
            yield f'{{"objects": [{{"desc": "{color} {shape}", "poly": [1, 2, 3, 4, 5, 6]}}]}}'
    for _ in range(4):
        yield '{"objects": []}'
        yield from _ENGLISH


def train_tiny_tokenizer(
    *, corpus: Iterable[str] | None = None, bpe_vocab_size: int = 512, coord_tokens: bool = True
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `corpus` (default: `default_corpus()`) and add Qwen's tokens behind it.

    Ids are dense: BPE pieces, special tokens, markup tokens, then (with `coord_tokens`) the coordinate
    tokens, contiguous and in bin order. There is no normalizer, so every unicode string survives
    encode and decode unchanged.

    Args:
        bpe_vocab_size: upper bound on the BPE pieces; 256 of them are the single bytes.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=bpe_vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(default_corpus() if corpus is None else corpus, trainer)
    bpe.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    bpe.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKUP_TOKENS])
    if coord_tokens:
        bpe.add_tokens(added_coord_tokens(COORD_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        chat_template=CHAT_TEMPLATE,
    )


def added_coord_tokens(texts: Iterable[str]) -> list[AddedToken]:
    """Coordinate tokens as tokenizer entries: matched verbatim, kept by `skip_special_tokens`."""
    return [AddedToken(text, special=False, normalized=False) for text in texts]
