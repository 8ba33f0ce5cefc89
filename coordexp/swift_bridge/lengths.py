"""How long a sample is once it is encoded, without reading its pictures.

    tokens = question + picture (of its size) + answer

A template tokenizes question and answer each on their own and puts as many placeholders as a picture has merged
patches, so the three add up; `LengthRule.of` takes the question from one sample that is encoded as a whole, and checks
the rule on others.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from qwen_vl_utils import vision_process

from coordexp.swift_bridge.prompts import encode_sample


@dataclass(frozen=True)
class LengthRule:
    """tokenizer: of the template.  question: tokens beside the picture's and the answer's.

    factor: pixels of a merged patch along a side.  max_pixels: of the template; None for no limit of its own.
    """

    tokenizer: Any
    question: int
    factor: int
    max_pixels: int | None

    @classmethod
    def of(
        cls, template: Any, rows: Sequence[Mapping[str, Any]], sizes: Sequence[tuple[int, int]]
    ) -> LengthRule | None:
        """The rule of a template in train mode; None where it does not hold for all of `rows`.

        rows: of messages and images, the same question in all of them.  sizes: of their first pictures.
        """
        processor = template.processor.image_processor
        rule = cls(template.tokenizer, 0, processor.patch_size * processor.merge_size, template.max_pixels)
        with without_limit(template):
            found = [encode_sample(template, row)["length"] for row in rows]
        told = [
            rule.picture_tokens(*size) + rule.answer_tokens([row["messages"][-1]["content"]])[0]
            for row, size in zip(rows, sizes, strict=True)
        ]
        rest = {length - part for length, part in zip(found, told, strict=True)}
        return cls(rule.tokenizer, rest.pop(), rule.factor, rule.max_pixels) if len(rest) == 1 else None

    def picture_tokens(self, width: int, height: int) -> int:
        """Placeholders of a picture, in pixels of its file. Raises ValueError for a shape the model cannot take."""
        return _picture_tokens(width, height, self.factor, self.max_pixels)

    def answer_tokens(self, answers: Sequence[str]) -> list[int]:
        """Tokens of each answer."""
        encoded = self.tokenizer(list(answers), add_special_tokens=False, return_attention_mask=False)
        return [len(ids) for ids in encoded["input_ids"]]

    @property
    def fingerprint(self) -> str:
        """Equal for rules that tell the same lengths."""
        vocabulary = self.tokenizer.backend_tokenizer.to_str()
        numbers = json.dumps([self.question, self.factor, self.max_pixels, *_limits()])
        return hashlib.sha256(f"{numbers} {vocabulary}".encode()).hexdigest()


@contextmanager
def without_limit(template: Any) -> Iterator[None]:
    """Within this context the template encodes samples of any length."""
    limit, template.max_length = template.max_length, None
    try:
        yield
    finally:
        template.max_length = limit


def _limits() -> tuple[int, int]:
    """Fewest and most tokens of a picture; ms-swift sets them from the environment."""
    return vision_process.IMAGE_MIN_TOKEN_NUM, vision_process.IMAGE_MAX_TOKEN_NUM


@lru_cache(maxsize=100_000)
def _picture_tokens(width: int, height: int, factor: int, max_pixels: int | None) -> int:
    if max_pixels and width * height > max_pixels:  # as swift.template.vision_utils.rescale_image
        ratio = width / height
        scaled_height = math.sqrt(max_pixels / ratio)
        width, height = int(scaled_height * ratio), int(scaled_height)
    least, most = (limit * factor**2 for limit in _limits())
    new_height, new_width = vision_process.smart_resize(height, width, factor, least, most)
    return int(new_height // factor) * int(new_width // factor)
