"""The prompt of a run: what its settings say, else what the model it starts from was trained with."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from coordexp.config.prompt import RUN_NAMES, describe, find_prompt, given_by_run, settle
from coordexp.config.schema.custom import Custom
from coordexp.config.schema.prompt import Prompt
from coordexp.swift_bridge.template import register_coord_template

logger = logging.getLogger(__name__)

TEXT_SETTINGS = {"user", "system", "media_order", "template"}
"""Settings of a prompt that its text is made of."""


def prompt_of_run(custom: Custom, swift: Mapping[str, Any], start: Iterable[str | None]) -> Prompt:
    """The prompt of a training run, whose template and pictures follow it from here on.

    swift: ms-swift's arguments, flat.
    start: folders the run starts from, the first that holds a prompt counts; None stands for one that is not given.

    What differs from the prompt of the model it starts from is said, with both texts. Where nothing of its text does,
    the prompt keeps the text it was trained with, which the template must write too. Raises ConfigError for a value
    that no prompt can have.
    """
    record = find_prompt(start)
    prompt, differences = settle(record, given_by_run(custom, swift))
    if record is not None and differences:
        logger.warning(
            "The run asks in another way than the model it starts from was trained (%s):%s\n  Leave a setting out to "
            "keep the model's.",
            record.path, describe(differences, RUN_NAMES),
        )  # fmt: skip
    elif record is not None:
        logger.info("The run asks as the model it starts from was trained (%s).", record.path)
    if record is not None and not TEXT_SETTINGS & {difference.name for difference in differences}:
        prompt = prompt.model_copy(update={"rendered": record.prompt.rendered})
    _use(prompt)
    return prompt


def use_prompt_of(folders: Iterable[str | Path | None]) -> None:
    """Template and pictures of this process follow the prompt that the first of `folders` holds, if any does."""
    record = find_prompt(folders)
    if record is not None:
        _use(record.prompt)


def _use(prompt: Prompt) -> None:
    register_coord_template(
        default_system=prompt.system, min_pixels=prompt.min_pixels, max_pixels=prompt.max_pixels
    )
