"""Turn the command line of `swift sft` into a registered trainer, before ms-swift loads anything.

Everything that can be wrong with flags, settings, tokenizer or data is reported here, when no output folder exists yet.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.config import Sections, check_variant, parse_sections, read_sections_file, swift_not_built
from coordexp.config.problems import raise_problems
from coordexp.data.dataset import read_training_rows
from coordexp.errors import ConfigError
from coordexp.swift_bridge.arguments import PluginFlags, read_plugin_flags
from coordexp.swift_bridge.dataset import register_jsonl
from coordexp.swift_bridge.factory import use_trainer
from coordexp.swift_bridge.template import register_coord_template
from coordexp.swift_bridge.versions import check_versions
from coordexp.trainers.runtime import RunSettings, activate

# variant name -> import path of its trainer
VARIANTS = {"stage1_coord": "coordexp.trainers.stage1.Stage1CoordTrainer"}


def activate_from_argv(argv: Sequence[str]) -> None:
    """Register the template, and for `swift sft` the datasets and the trainer that the flags ask for.

    Other ms-swift commands (infer, export, ...) that replay the plugin of a checkpoint get the template only.
    Without a trainer variant ms-swift trains as usual.
    """
    check_versions()
    register_coord_template()
    if Path(sys.argv[0]).name != "sft.py":
        return
    flags = read_plugin_flags(argv)
    sections = _sections(flags)
    variant = _variant(flags, sections)
    if variant is None:
        return
    raise_problems(swift_not_built(flags.swift))
    _check_tokenizer(flags.model)
    _register_datasets(flags, sections)
    use_trainer(VARIANTS[variant])
    activate(RunSettings(variant=variant, sections=sections, swift=flags.swift))


def _sections(flags: PluginFlags) -> Sections:
    if flags.sections is not None and flags.config_file is not None:
        raise ConfigError("--coordexp and --coordexp_config are both given; put the settings in one place.")
    if flags.config_file is not None:
        return read_sections_file(flags.config_file)
    return parse_sections(flags.sections or {}, source="--coordexp")


def _variant(flags: PluginFlags, sections: Sections) -> str | None:
    """The trainer variant of the run, None for plain ms-swift."""
    if flags.variant is None:
        return sections.custom.trainer_variant
    try:
        variant = check_variant(flags.variant)
    except ValueError as error:
        raise ConfigError(f"--custom_trainer_variant {flags.variant!r}: {error}.") from None
    if variant not in VARIANTS:
        raise ConfigError(
            f"--custom_trainer_variant {variant}: a valid variant, but its trainer is not built yet in this version "
            f"of coordexp; expected one of {', '.join(sorted(VARIANTS))}."
        )
    return variant


def _check_tokenizer(model: str | None) -> None:
    """For a local model folder: are the coordinate tokens there? (A hub id is checked when the trainer starts.)"""
    if model is None or not Path(model).is_dir():
        return
    from transformers import AutoTokenizer

    CoordVocab.from_tokenizer(AutoTokenizer.from_pretrained(model))


def _register_datasets(flags: PluginFlags, sections: Sections) -> None:
    """Read and validate every data file now; ms-swift asks for the rows later."""
    custom = sections.custom
    read = partial(
        read_training_rows,
        prompt=custom.prompt,
        field_order=custom.object_field_order,
        ordering=custom.object_ordering,
        seed=flags.data_seed,
    )
    register_jsonl(flags.datasets, read)
