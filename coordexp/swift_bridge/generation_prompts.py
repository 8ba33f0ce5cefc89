"""Questions as a training template encodes them for generation, leaving template and model as they were."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from swift.infer_engine import InferRequest
from torch import Tensor, nn


def questions_template(template: Any, model: nn.Module | None) -> Any:
    """A copy of `template` that encodes questions for `generate`; the original keeps its mode.

    model: says how positions of image patches are counted; None where only token ids are wanted.
    """
    questions = copy(template)
    questions.set_mode("transformers")
    questions.model = model
    questions.padding_free = False
    questions.packing = False
    questions.sequence_parallel_size = 1
    questions.remove_unused_columns = True
    return questions


@contextmanager
def without_training_hooks(template: Any) -> Iterator[None]:
    """The hooks by which the template changes inputs of training forwards are off the model meanwhile."""
    with template.generate_context():
        yield


def encode_question(
    questions: Any, messages: Sequence[dict[str, str]], images: Sequence[str | bytes]
) -> dict[str, Any]:
    """Encoded inputs of one conversation that ends with the user; `input_ids` has image placeholders expanded."""
    request = InferRequest(messages=[dict(message) for message in messages], images=list(images))
    encoded: dict[str, Any] = questions.encode(request)
    return encoded


def prompt_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """A prompt as text, the visual tokens of each picture written as one."""
    return re.sub(r"(<\|image_pad\|>)+", "<|image_pad|>", tokenizer.decode(list(ids)))


def collate_questions(
    questions: Any, encoded: Sequence[dict[str, Any]], device: torch.device
) -> dict[str, Tensor]:
    """A left-padded batch for `generate`; the model counts positions itself."""
    batch = questions.data_collator([dict(entry) for entry in encoded])
    batch.pop("position_ids", None)
    return {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}


def with_answers(
    batch: dict[str, Tensor], answers: Sequence[Sequence[int]], pad_id: int
) -> dict[str, Tensor]:
    """A batch of `collate_questions` with an answer behind each question, padded on the right."""
    device = batch["input_ids"].device
    length = max(map(len, answers))
    added = torch.tensor([[*answer, *[pad_id] * (length - len(answer))] for answer in answers], device=device)
    is_answer = torch.tensor(
        [[1] * len(answer) + [0] * (length - len(answer)) for answer in answers], device=device
    )
    behind = {"input_ids": added, "attention_mask": is_answer.to(batch["attention_mask"].dtype)}
    if "mm_token_type_ids" in batch:
        behind["mm_token_type_ids"] = torch.zeros_like(added, dtype=batch["mm_token_type_ids"].dtype)
    return batch | {name: torch.cat([batch[name], part], dim=1) for name, part in behind.items()}


def stop_token_ids(template: Any, model_eos: int | Sequence[int] | None) -> tuple[int, ...]:
    """Ids that end an answer: the template's stop words that are single tokens, the tokenizer's and the model's eos."""
    tokenizer = template.tokenizer
    ids = {tokenizer.eos_token_id} | set([model_eos] if isinstance(model_eos, int) else model_eos or ())
    for word in (*template.template_meta.stop_words, *template.template_meta.suffix):
        word_ids = tokenizer.encode(word, add_special_tokens=False) if isinstance(word, str) else list(word)
        if len(word_ids) == 1:
            ids.add(word_ids[0])
    return tuple(sorted(token_id for token_id in ids if token_id is not None))
