"""The settings of the run in this process: set once by the plugin, read once by the trainer ms-swift builds.

ms-swift constructs trainers from an import path and hands them nothing of ours, so the settings wait here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.forms.choose import form_of
from coordexp.config import Prompt, Sections
from coordexp.errors import ConfigError


@dataclass(frozen=True)
class RunSettings:
    """Everything of ours that a trainer needs.

    variant: trainer variant name.  sections: our typed settings.  swift: ms-swift's arguments as given, flat.
    prompt: what the model is asked, and the form it answers in.
    """

    variant: str
    sections: Sections
    swift: Mapping[str, Any]
    prompt: Prompt

    @property
    def form(self) -> AnswerForm:
        """How the model writes its answers."""
        return form_of(self.prompt.answer_form, self.prompt.object_field_order)

    @property
    def eval_prompt_variant(self) -> str | None:
        """Name of the message that evaluation rollouts ask with; None: as in training."""
        rollout = self.sections.rollout_matching
        return None if rollout is None else rollout.eval_prompt_variant

    @property
    def eval_prompt(self) -> Prompt:
        """What evaluation rollouts ask: `prompt`, with another user message where a variant is named."""
        name = self.eval_prompt_variant
        if name is None:
            return self.prompt
        return self.prompt.model_copy(update={"user": self.sections.custom.prompt_variants[name]})


_active: RunSettings | None = None


def activate(settings: RunSettings) -> None:
    """Make `settings` those of this process."""
    global _active
    _active = settings


def active() -> RunSettings:
    """The settings of this process; ConfigError when no plugin set them."""
    if _active is None:
        raise ConfigError(
            "no coordexp settings in this process: start training with `--external_plugins coordexp/plugin.py "
            "--custom_trainer_variant NAME` or with `coordexp train FILE`."
        )
    return _active
