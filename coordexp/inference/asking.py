"""How a model is asked: as it was trained, unless the caller says otherwise, which is then told."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.forms.choose import form_of
from coordexp.config.prompt import PROMPT_FILE, PromptRecord, describe, find_prompt, settle
from coordexp.config.schema.prompt import Prompt

logger = logging.getLogger(__name__)

QWEN_QUESTION = "Locate every object in the image. Report bbox coordinates in JSON format."
"""Asks a Qwen3-VL that nobody has trained, in the words of Qwen's own examples."""


class Asking(NamedTuple):
    """prompt: what is asked.  record: how the model was trained, where its folder says so."""

    prompt: Prompt
    record: PromptRecord | None

    @property
    def form(self) -> AnswerForm:
        """How it answers."""
        return form_of(self.prompt.answer_form, self.prompt.object_field_order)


def asking(
    model: Path, given: Mapping[str, Any], *, flags: Mapping[str, str], has_coord_tokens: bool = True
) -> Asking:
    """The prompt for a checkpoint folder, LoRA folder or model folder.

    given: values by names of `Prompt` that the caller wants instead of those the model was trained with; a warning
        shows both.
    flags: how the caller writes each of them.
    has_coord_tokens: of the tokenizer. A model without, of which nothing says how it was trained, is taken for a
        Qwen3-VL as it comes: it is asked in QWEN_QUESTION's words and answers in Qwen's own form.

    Raises ConfigError for a value that no prompt can have, or a record that cannot be read.
    """
    record = find_prompt(_folders(model))
    if record is None and not has_coord_tokens:
        given = {"answer_form": "qwen", **given}
        if given["answer_form"] == "qwen":
            given = {"user": QWEN_QUESTION, **given}
    prompt, differences = settle(record, given)
    if record is None:
        logger.warning(
            "%s holds no %s, so nothing says how it was trained; it is asked %r%s%s.",
            model, PROMPT_FILE, prompt.user,
            "" if prompt.system is None else f" with the system message {prompt.system!r}",
            "" if prompt.answer_form == "coordjson" else f", and its answers are read as {prompt.answer_form}",
        )  # fmt: skip
    elif differences:
        logger.warning(
            "%s is asked in another way than it was trained (%s):%s",
            model, record.path, describe(differences, flags),
        )  # fmt: skip
    return Asking(prompt, record)


def _folders(model: Path) -> list[str | Path]:
    from coordexp.models.merge_offset import base_model, is_adapter

    return [model, base_model(model)] if is_adapter(model) else [model]
