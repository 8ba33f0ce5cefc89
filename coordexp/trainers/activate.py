"""Turn the command line of `swift sft` into a registered trainer, before ms-swift loads anything.

Everything that can be wrong with flags, settings, tokenizer or data is reported here, when no output folder exists yet.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from coordexp.config import Sections, check_variant, swift_not_built
from coordexp.config.checks.problems import COMMAND_LINE, Place, Problem, dotted, raise_problems
from coordexp.config.contradictions.answer_forms import number_problems
from coordexp.config.exit_code import leave_exit_code
from coordexp.config.prompt import with_prompt
from coordexp.config.run.advice import untrained_rows
from coordexp.config.run.dotted import sections_of_flags
from coordexp.config.run.machine import package_problems
from coordexp.config.run.run_problems import run_problems
from coordexp.config.schema.sections import check_sections_fit
from coordexp.data.dataset import RowMaker
from coordexp.errors import ConfigError, CoordExpError
from coordexp.metrics.best import best_metric_problems, steered_metric_problems
from coordexp.swift_bridge.arguments import LoadFlags, PluginFlags, read_load_flags, read_plugin_flags
from coordexp.swift_bridge.loading import in_turn, prepare_loaded_models
from coordexp.swift_bridge.prompts import first_too_long
from coordexp.swift_bridge.registry.factory import use_trainer
from coordexp.swift_bridge.remote_code import TRUST_SETTING, check_models
from coordexp.swift_bridge.template import register_coord_template
from coordexp.swift_bridge.versions import check_versions
from coordexp.telemetry.rules.check import rule_problems
from coordexp.trainers.offset_training import preparation, refuse_unmerged, restore_for_inference
from coordexp.trainers.optimizers import register_optimizers
from coordexp.trainers.runtime import RunSettings, activate
from coordexp.trainers.start.latent import prefix_preparation
from coordexp.trainers.start.launchers import check_launcher
from coordexp.trainers.start.leave_nothing import leave_nothing
from coordexp.trainers.start.meeting.hold import meet
from coordexp.trainers.start.meeting.ranks import of_launcher, tell_failure
from coordexp.trainers.start.prompt import prompt_of_run, use_prompt_of
from coordexp.trainers.start.register import checked_tokenizer, register_datasets, warn_if_no_type_counts

logger = logging.getLogger(__name__)

# variant name -> import path of its trainer
VARIANTS = {
    "stage1_coord": "coordexp.trainers.stage1.Stage1CoordTrainer",
    "stage2_rollout_aligned": "coordexp.trainers.stage2.Stage2RolloutAlignedTrainer",
    "stage2_two_channel": "coordexp.trainers.stage2.Stage2TwoChannelTrainer",
    "latent_prefix": "coordexp.trainers.latent.trainer.LatentPrefixTrainer",
}


def trains(argv: Sequence[str]) -> bool:
    """Whether this is a process of `swift sft`, and no worker of one."""
    return Path(argv[0]).name == "sft.py" and not multiprocessing.current_process().daemon


def is_rlhf(argv: Sequence[str]) -> bool:
    """Whether this is a process of `swift rlhf`."""
    return Path(argv[0]).name == "rlhf.py"


def activate_from_argv(argv: Sequence[str]) -> bool:
    """Register the template, and for `swift sft` and `swift rlhf` what their flags ask for.

    In a worker process nothing is done: what a worker needs is sent to it.
    Other ms-swift commands (infer, export, ...) that replay the plugin of a checkpoint get the template and what
    the checkpoint's model needs.
    Without a trainer variant ms-swift trains as usual. Returns whether a trainer of ours does.
    """
    if multiprocessing.current_process().daemon:  # data loaders, packers; ms-swift replays the plugin there
        return False
    check_versions()
    register_coord_template()
    log_to_console()
    if is_rlhf(sys.argv):
        _start_rlhf(argv)
        return False
    if not trains(sys.argv):
        load = read_load_flags(argv)
        refuse_unmerged(load.adapters)
        trusted = _sections(load).custom.trust_remote_code
        check_models(load.model, load.adapters, trusted=trusted, setting=TRUST_SETTING, hub=load.hub)
        use_prompt_of((*load.adapters, load.model))
        prepare_loaded_models(restore_for_inference, trust_remote_code=trusted)
        return False
    sys.excepthook = end_in_one_line
    ranks = of_launcher()
    flags = read_plugin_flags(argv)
    sections = _sections(flags)
    trusted = sections.custom.trust_remote_code
    check_models(
        flags.model, flags.swift["adapters"] or (), trusted=trusted, setting=TRUST_SETTING, hub=flags.swift
    )
    variant = _variant(flags, sections)
    if variant is None:
        return False
    if sections.custom.dry_run is not None:
        leave_nothing(argv, flags.swift["output_dir"])
    check_launcher(os.environ)
    raise_problems(_problems(variant, sections, flags.swift))
    if ranks is not None:
        meet(ranks, flags, sections)
    for sentence in untrained_rows(flags.swift, coord_offset=sections.custom.coord_offset.enabled):
        logger.warning(sentence)
    start = (flags.swift["resume_from_checkpoint"], *(flags.swift["adapters"] or ()))
    prompt = prompt_of_run(sections.custom, flags.swift, (*start, flags.model))
    sections = sections.model_copy(update={"custom": with_prompt(sections.custom, prompt)})
    raise_problems([Problem(dotted(path), text) for path, text in number_problems(sections, variant)])
    checked_tokenizer(flags.model, prompt)
    names = register_datasets(flags, sections, RowMaker(prompt, flags.data_seed))
    warn_if_no_type_counts(sections, names)
    prepare_loaded_models(
        in_turn(
            preparation(sections.custom.coord_offset, start),
            prefix_preparation(
                sections.custom,
                prompt,
                start,
                seed=int(flags.swift["seed"]),
                with_optimizer=None if flags.swift["resume_only_model"] else start[0],
            ),
        ),
        trust_remote_code=trusted,
    )
    register_optimizers()
    use_trainer(VARIANTS[variant])
    activate(
        RunSettings(
            variant, sections, {**flags.swift, "strict": flags.strict, "data_seed": flags.data_seed}, prompt
        )
    )
    return True


def _start_rlhf(argv: Sequence[str]) -> None:
    from coordexp.trainers.rlhf.start import activate_rlhf  # loads trl, which swift sft has no use for

    check_launcher(os.environ)
    flags = read_plugin_flags(argv, rlhf=True)
    sections = _sections(flags)
    refuse_unmerged(flags.swift["adapters"] or ())
    activate_rlhf(flags, sections)
    prepare_loaded_models(restore_for_inference, trust_remote_code=sections.custom.trust_remote_code)
    sys.excepthook = end_in_one_line


def end_in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A `sys.excepthook`: errors raised on purpose end the process with their message and exit code.

    Of one that a data-loader worker raised, the message is what stands after torch's copy of the traceback.
    """
    of_first_record = first_too_long(error)
    if of_first_record is not None:
        error = of_first_record
    tell_failure(error)
    if not isinstance(error, CoordExpError):
        sys.__excepthook__(kind, error, trace)
        return
    message = str(error).rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")[2].strip()
    # Where a process group is up, torch calls this hook with a stderr of its own, and loses what stands in it.
    print(f"coordexp: {message}", file=sys.__stderr__, flush=True)
    leave_exit_code(error.exit_code)
    raise SystemExit(error.exit_code)


def log_to_console() -> None:
    """Show what our modules log, in the form of ms-swift's own lines; once per process."""
    ours = logging.getLogger("coordexp")
    if ours.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[%(levelname)s:coordexp] %(message)s"))
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)


def _sections(flags: PluginFlags | LoadFlags) -> Sections:
    return sections_of_flags(flags.sections, flags.config_file, flags.dotted)


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


def _problems(variant: str, sections: Sections, swift: Mapping[str, Any]) -> list[Problem]:
    """Everything that is wrong with the settings of a run."""
    return [
        *swift_not_built(swift),
        *check_sections_fit(sections, variant),
        *best_metric_problems(variant, sections, swift, _as_flag),
        *steered_metric_problems(variant, sections, swift, _as_flag),
        *package_problems(variant, sections, swift, _as_flag),
        *rule_problems(variant, sections, swift, _as_flag),
        *run_problems(variant, sections, swift, _as_flag, lambda _path: None),
    ]


def _as_flag(name: str) -> tuple[str, Place | None]:
    return f"--{name}", COMMAND_LINE
