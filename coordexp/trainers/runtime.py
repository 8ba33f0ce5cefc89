"""The settings of the run in this process: set once by the plugin, read once by the trainer ms-swift builds.

ms-swift constructs trainers from an import path and hands them nothing of ours, so the settings wait here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from coordexp.errors import ConfigError


@dataclass(frozen=True)
class RunSettings:
    """Everything of ours that a trainer needs.

    variant: trainer variant name.  sections: the typed configuration sections (`coordexp.config.Sections`).
    meta: written as the first record of metrics.jsonl (config hash, versions, command).
    """

    variant: str
    sections: Any
    meta: dict[str, Any] = field(default_factory=dict)


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
