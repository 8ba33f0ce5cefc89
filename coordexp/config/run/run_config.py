"""A whole run: ms-swift's arguments and our sections, from one YAML file and the command line.

Two forms of the file mean the same:

    sections (for `coordexp train`)           ms-swift's flat form (also for plain `swift sft FILE`)
      model: {model: PATH}                      model: PATH
      training: {max_steps: 100}                max_steps: 100
      custom: {train_jsonl: a.jsonl}            dataset: [a.jsonl]
                                                external_plugins: [coordexp/plugin.py]
                                                ignore_args_error: true
                                                custom_trainer_variant: stage1_coord
                                                coordexp: {custom: {...}}

A file that sets `rlhf_type` is one of `swift rlhf`, whose trainers are ms-swift's; it has no trainer variant.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordexp.config.checks import swift_arguments
from coordexp.config.run.resolved import config_hash
from coordexp.config.schema.custom import RLHF, Custom, Debug, Experiment
from coordexp.config.schema.rollout import RolloutMatching
from coordexp.config.schema.sections import Sections
from coordexp.config.schema.stage2 import Stage2AB
from coordexp.shipped import PLUGIN_FILE


@dataclass(frozen=True)
class RunConfig:
    """One run, checked.

    swift: the ms-swift arguments that were set or derived, flat.  sections: ours.  env: environment
    variables that the file asks for.  sources: dotted path of every value that was written -> where.
    """

    path: str
    variant: str
    swift: Mapping[str, Any]
    sections: Sections
    effective_batch_size: int | None = None
    global_max_length: int | None = None
    world_size: int = 1
    env: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """What of ms-swift runs it: `sft`, or `rlhf`."""
        return RLHF if self.variant == RLHF else "sft"

    @property
    def custom(self) -> Custom:
        return self.sections.custom

    @property
    def stage2_ab(self) -> Stage2AB | None:
        return self.sections.stage2_ab

    @property
    def rollout_matching(self) -> RolloutMatching | None:
        return self.sections.rollout_matching

    @property
    def debug(self) -> Debug:
        return self.sections.debug

    @property
    def experiment(self) -> Experiment:
        return self.sections.experiment

    @property
    def config_hash(self) -> str:
        """sha256 of what the run computes; see `coordexp.config.run.resolved.config_hash`."""
        return config_hash(self.variant, self.sections, self.swift)

    def to_swift_flat(self) -> dict[str, Any]:
        """The whole run in ms-swift's flat form, ready for `swift sft`."""
        sections = self.sections.to_json()
        for key in ("train_jsonl", "val_jsonl", "trainer_variant"):
            sections.get("custom", {}).pop(key, None)
        sections.get("training", {}).pop("effective_batch_size", None)
        plugins = [plugin for plugin in self.swift.get("external_plugins", []) if not is_our_plugin(plugin)]
        return {
            **self.swift,
            "external_plugins": [*plugins, str(PLUGIN_FILE)],
            "ignore_args_error": True,
            **({} if self.variant == RLHF else {"custom_trainer_variant": self.variant}),
            **({"coordexp": sections} if any(sections.values()) else {}),
        }

    def to_swift_argv(self) -> list[str]:
        """`to_swift_flat` as the flags of `command`."""
        argv: list[str] = []
        for name, value in self.to_swift_flat().items():
            if value is None or (value == [] and _is_default(name, value)):
                continue
            argv += [f"--{name}", *_words(value)]
        return argv


def is_our_plugin(plugins: Any) -> bool:
    """Whether `external_plugins` (one path or several) names coordexp/plugin.py."""
    paths = plugins if isinstance(plugins, list) else [plugins]
    return any(Path(str(path)).parts[-2:] == ("coordexp", "plugin.py") for path in paths)


def _is_default(name: str, value: Any) -> bool:
    argument = swift_arguments.all_arguments(rlhf=True).get(name)
    return argument is not None and argument.default in (value, None)


def _words(value: Any) -> Sequence[str]:
    if isinstance(value, list):
        return [_word(item) for item in value]
    return [_word(value)]


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)
