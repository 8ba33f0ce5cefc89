"""How a model is asked: as it was trained, unless the caller says otherwise, which is then told."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from coordexp.config.prompt import PROMPT_FILE, PromptRecord, describe, find_prompt, settle
from coordexp.config.schema.prompt import Prompt

logger = logging.getLogger(__name__)


class Asking(NamedTuple):
    """prompt: what is asked.  record: how the model was trained, where its folder says so."""

    prompt: Prompt
    record: PromptRecord | None


def asking(model: Path, given: Mapping[str, Any], *, flags: Mapping[str, str]) -> Asking:
    """The prompt for a checkpoint folder, LoRA folder or model folder.

    given: values by names of `Prompt` that the caller wants instead of those the model was trained with; a warning
        shows both.
    flags: how the caller writes each of them.

    Raises ConfigError for a value that no prompt can have, or a record that cannot be read.
    """
    record = find_prompt(_folders(model))
    prompt, differences = settle(record, given)
    if record is None:
        logger.warning(
            "%s holds no %s, so nothing says how it was trained; it is asked %r%s.",
            model, PROMPT_FILE, prompt.user,
            "" if prompt.system is None else f" with the system message {prompt.system!r}",
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
