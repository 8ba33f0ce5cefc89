"""How long a sample is once it is encoded, without reading its pictures.

    tokens = question + picture (of its size) + answer

A template tokenizes question and answer each on their own and puts as many placeholders as a picture has merged
patches, so the three add up; `LengthRule.of` takes the question from one sample that is encoded as a whole, and checks
the rule on others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any

from coordexp.image_size import PixelLimits
from coordexp.swift_bridge.prompts import encode_sample


@dataclass(frozen=True)
class LengthRule:
    """tokenizer: of the template.  question: tokens beside the picture's and the answer's.

    limits: by which the template scales pictures.  scale: factor on their sides before that.
    """

    tokenizer: Any
    question: int
    limits: PixelLimits
    scale: float = 1.0

    @classmethod
    def of(
        cls, template: Any, rows: Sequence[Mapping[str, Any]], sizes: Sequence[tuple[int, int]]
    ) -> LengthRule | None:
        """The rule of a template in train mode; None where it does not hold for all of `rows`.

        rows: of messages and images, the same question in all of them.  sizes: of their first pictures.
        """
        rule = cls(template.tokenizer, 0, template.pixel_limits)
        with without_limit(template):
            found = [encode_sample(template, row)["length"] for row in rows]
        told = [
            rule.picture_tokens(*size) + rule.answer_tokens([row["messages"][-1]["content"]])[0]
            for row, size in zip(rows, sizes, strict=True)
        ]
        rest = {length - part for length, part in zip(found, told, strict=True)}
        return replace(rule, question=rest.pop()) if len(rest) == 1 else None

    def picture_tokens(self, width: int, height: int) -> int:
        """Placeholders of a picture of that size. Raises RecordError for a shape the model cannot take."""
        return self.limits.num_tokens(round(width * self.scale), round(height * self.scale))

    def answer_tokens(self, answers: Sequence[str]) -> list[int]:
        """Tokens of each answer."""
        encoded = self.tokenizer(list(answers), add_special_tokens=False, return_attention_mask=False)
        return [len(ids) for ids in encoded["input_ids"]]

    @property
    def fingerprint(self) -> str:
        """Equal for rules that tell the same lengths."""
        vocabulary = self.tokenizer.backend_tokenizer.to_str()
        numbers = json.dumps([self.question, self.scale, *astuple(self.limits)])
        return hashlib.sha256(f"{numbers} {vocabulary}".encode()).hexdigest()


@contextmanager
def without_limit(template: Any) -> Iterator[None]:
    """Within this context the template encodes samples of any length."""
    limit, template.max_length = template.max_length, None
    try:
        yield
    finally:
        template.max_length = limit
