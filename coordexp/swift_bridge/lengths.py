"""How long a sample is once it is encoded, without reading its pictures.

    tokens = question + picture (of its size) + answer

A template tokenizes question and answer each on their own and puts as many placeholders as a picture has merged
patches, so the three add up; `LengthRule.of` takes the question from one sample that is encoded as a whole, and checks
the rule on others. Where questions differ, the text of each is counted beside what all of them have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any

from coordexp.config.schema.prompt import IMAGE_TAG
from coordexp.image_size import PixelLimits
from coordexp.swift_bridge.prompts import encode_sample


@dataclass(frozen=True)
class LengthRule:
    """tokenizer: of the template.  rest: tokens beside those of the question's text, the picture and the answer.

    longest_text: tokens of the longest question among the samples that were encoded.
    limits: by which the template scales pictures.  scale: factor on their sides before that.
    """

    tokenizer: Any
    rest: int
    longest_text: int
    limits: PixelLimits
    scale: float = 1.0

    @classmethod
    def of(
        cls, template: Any, rows: Sequence[Mapping[str, Any]], sizes: Sequence[tuple[int, int]]
    ) -> LengthRule | None:
        """The rule of a template in train mode; None where it does not hold for all of `rows`.

        rows: of messages and images, questions of one form.  sizes: of their first pictures.
        """
        rule = cls(template.tokenizer, 0, 0, template.pixel_limits)
        texts = rule.question_tokens([row["messages"] for row in rows])
        with without_limit(template):
            found = [encode_sample(template, row)["length"] for row in rows]
        told = [
            text + rule.picture_tokens(*size) + rule.answer_tokens([row["messages"][-1]["content"]])[0]
            for text, row, size in zip(texts, rows, sizes, strict=True)
        ]
        rest = {length - part for length, part in zip(found, told, strict=True)}
        return replace(rule, rest=rest.pop(), longest_text=max(texts)) if len(rest) == 1 else None

    def picture_tokens(self, width: int, height: int) -> int:
        """Placeholders of a picture of that size. Raises RecordError for a shape the model cannot take."""
        return self.limits.num_tokens(round(width * self.scale), round(height * self.scale))

    def question_tokens(self, conversations: Sequence[Sequence[Mapping[str, str]]]) -> list[int]:
        """Tokens of the text of each question, without its pictures."""
        texts = [
            "".join(turn["content"] for turn in turns if turn["role"] != "assistant").replace(IMAGE_TAG, "")
            for turns in conversations
        ]
        distinct = list(dict.fromkeys(texts))
        counts = dict(zip(distinct, self.answer_tokens(distinct), strict=True))
        return [counts[text] for text in texts]

    def answer_tokens(self, answers: Sequence[str]) -> list[int]:
        """Tokens of each answer."""
        encoded = self.tokenizer(list(answers), add_special_tokens=False, return_attention_mask=False)
        return [len(ids) for ids in encoded["input_ids"]]

    @property
    def fingerprint(self) -> str:
        """Equal for rules that tell the same lengths."""
        vocabulary = self.tokenizer.backend_tokenizer.to_str()
        numbers = json.dumps([self.rest, self.scale, *astuple(self.limits)])
        return hashlib.sha256(f"{numbers} {vocabulary}".encode()).hexdigest()


@contextmanager
def without_limit(template: Any) -> Iterator[None]:
    """Within this context the template encodes samples of any length."""
    limit, template.max_length = template.max_length, None
    try:
        yield
    finally:
        template.max_length = limit
