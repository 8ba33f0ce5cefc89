"""Where the text of a prompt stands in an encoded sample, and the same sample with latent tokens in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coordexp.codec.coord_vocab import Tokenizer
from coordexp.codec.latent_vocab import latent_text
from coordexp.config.schema.prompt import IMAGE_TAG
from coordexp.data.raw_samples import RawSample
from coordexp.errors import RecordError

SPAN = "coordexp_prompt_span"
"""Where an encoded sample carries it."""


class PromptSpan(NamedTuple):
    """Token positions start .. stop - 1."""

    start: int
    stop: int


def text_of_prompt(messages: Sequence[Mapping[str, str]]) -> str:
    """The text of the last user message, without its images."""
    user = next(message for message in reversed(messages) if message["role"] == "user")
    return user["content"].replace(IMAGE_TAG, "")


class SpanMarker:
    """Adds SPAN to encoded samples. Of the module and with plain fields, so that workers can be given it."""

    def __init__(self, tok: Tokenizer) -> None:
        self._tok = tok

    def __call__(self, row: Mapping[str, Any], sample: dict[str, Any]) -> dict[str, Any]:
        """Raises RecordError (the row is not named) where the text of the prompt is not spelled as on its own."""
        text_ids = self._tok.encode(text_of_prompt(row["messages"]), add_special_tokens=False)
        labels = list(sample["labels"])
        answer = next((index for index, label in enumerate(labels) if label != -100), len(labels))
        return {**sample, SPAN: find_span(list(sample["input_ids"])[:answer], text_ids)}


def find_span(prompt_ids: Sequence[int], text_ids: Sequence[int]) -> PromptSpan:
    """The last place where `prompt_ids` holds `text_ids`; RecordError where there is none."""
    wanted, length = list(text_ids), len(text_ids)
    for start in range(len(prompt_ids) - length, -1, -1):
        if length and list(prompt_ids[start : start + length]) == wanted:
            return PromptSpan(start, start + length)
    raise RecordError(
        "the text of its prompt has other tokens in the prompt than on its own, so that no latent tokens can take "
        "their place; begin and end the prompt with a letter, or use media_order: media_first"
    )


_BY_TOKEN = ("input_ids", "labels", "loss_scale")
_OF_PICTURES = ("pixel_values",)


def with_latent_tokens(sample: Mapping[str, Any], latent_ids: Sequence[int]) -> dict[str, Any]:
    """An encoded sample whose prompt's text is latent tokens; its pictures' patches are left out, not their grids."""
    start, stop = sample[SPAN]
    changed = {key: value for key, value in sample.items() if key not in (SPAN, *_OF_PICTURES)}
    for key in _BY_TOKEN:
        if changed.get(key) is not None:
            tokens = list(latent_ids) if key == "input_ids" else [sample[key][start]] * len(latent_ids)
            changed[key] = [*sample[key][:start], *tokens, *sample[key][stop:]]
    kinds = changed.get("mm_token_type_ids")
    if kinds is not None:
        kinds = torch.as_tensor(kinds)
        latent = torch.zeros(len(latent_ids), dtype=kinds.dtype)
        changed["mm_token_type_ids"] = torch.cat([kinds[:start], latent, kinds[stop:]])
    length = len(changed["input_ids"])
    for key, value in (("length", length), ("lengths", [length])):
        if key in changed:
            changed[key] = value
    return changed


def cut_prompt(tok: Any, text_ids: Sequence[int], num_tokens: int) -> str:
    """The first tokens of a prompt's text, as text. tok: a tokenizer of transformers."""
    return str(tok.decode(list(text_ids)[:num_tokens]))


def texts_of_batch(samples: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
    """Token ids [S, L] of the prompts' texts, padded with 0 on the right, and their mask."""
    texts = [list(sample["input_ids"])[slice(*sample[SPAN])] for sample in samples]
    return padded(texts)


def padded(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """int64 [S, L] with 0 on the right, and bool [S, L]."""
    length = max(map(len, texts))
    ids_SL = torch.tensor([[*text, *[0] * (length - len(text))] for text in texts])
    mask_SL = torch.arange(length) < torch.tensor([[len(text)] for text in texts])
    return ids_SL, mask_SL


class LatentQuestions:
    """Questions with latent tokens in the place of their text.

    questions: a sequence of RawSample.
    """

    def __init__(self, questions: Any, tok: Tokenizer, latent_ids: Sequence[int]) -> None:
        self._questions, self._tok, self._latent_ids = questions, tok, tuple(latent_ids)
        self._texts: dict[str, tuple[int, ...]] = {}

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, index: int, /) -> RawSample:
        raw: RawSample = self._questions[index]
        self._texts[raw.sample_id] = tuple(
            self._tok.encode(text_of_prompt(raw.messages), add_special_tokens=False)
        )
        return latent_question(raw, self._tok, self._latent_ids)

    def text_of(self, sample_id: str) -> tuple[int, ...]:
        """Token ids of the text of a question that was asked for."""
        return self._texts[sample_id]


def latent_question(raw: RawSample, tok: Tokenizer, latent_ids: Sequence[int]) -> RawSample:
    """A question with latent tokens in the place of its text."""
    text = text_of_prompt(raw.messages)
    span = find_span(raw.prompt_ids, tok.encode(text, add_special_tokens=False))
    messages = tuple(
        {**message, "content": message["content"].replace(text, latent_text(len(latent_ids)))}
        if message["role"] == "user"
        else message
        for message in raw.messages
    )
    ids = (*raw.prompt_ids[: span.start], *latent_ids, *raw.prompt_ids[span.stop :])
    return replace(raw, messages=messages, prompt_ids=ids)
