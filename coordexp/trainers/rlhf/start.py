"""Turn the command line of `swift rlhf` into a run on our data, before ms-swift loads anything.

ms-swift's trainers and objectives are used as they are. Ours are the questions, the rewards, and what a checkpoint
keeps: the prompt it was trained with.
"""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from coordexp.config import Prompt, Sections, derive, resolved_config, swift_not_built, write_resolved
from coordexp.config.checks.problems import COMMAND_LINE, Place, Problem, raise_problems
from coordexp.config.prompt import with_prompt, write_prompt
from coordexp.config.run.run_problems import run_problems
from coordexp.config.schema.custom import RLHF
from coordexp.config.schema.sections import check_sections_fit
from coordexp.data.dataset import RowMaker
from coordexp.errors import ConfigError
from coordexp.metrics.sinks import installed_versions
from coordexp.models.model_files import write_pixel_limits
from coordexp.swift_bridge.arguments import PluginFlags
from coordexp.swift_bridge.prompts import complete_prompt
from coordexp.swift_bridge.registry.rlhf import use_rlhf_trainers
from coordexp.swift_bridge.remote_code import TRUST_SETTING, check_models
from coordexp.trainers.rlhf.rewards import register_rewards
from coordexp.trainers.rlhf.rows import TaughtRows
from coordexp.trainers.start.prompt import prompt_of_run
from coordexp.trainers.start.register import checked_tokenizer, register_datasets

logger = logging.getLogger(__name__)


def activate_rlhf(flags: PluginFlags, sections: Sections) -> None:
    """Register data sets, reward functions and trainers for the run that the flags ask for.

    Raises ConfigError or RecordError for everything that can be wrong with flags, settings, tokenizer or data.
    """
    swift, trusted = flags.swift, sections.custom.trust_remote_code
    raise_problems([*_variant_problems(flags, sections), *_problems(flags, sections)])
    adapters = tuple(swift["adapters"] or ())
    others = [swift[key] for key in ("ref_model", "teacher_model") if swift[key]]
    for model in (flags.model, *others):
        check_models(model, adapters, trusted=trusted, setting=TRUST_SETTING, hub=swift)
    prompt = prompt_of_run(sections.custom, swift, (swift["resume_from_checkpoint"], *adapters, flags.model))
    tok = checked_tokenizer(flags.model, prompt)
    if tok is None:
        raise ConfigError(
            f"model {flags.model!r} is no folder; expected a checkpoint of stage 1, whose answers can be rewarded."
        )
    sections = sections.model_copy(update={"custom": with_prompt(sections.custom, prompt)})
    maker = RowMaker(prompt, flags.data_seed)
    question = sections.custom.teacher_prompt
    register_datasets(flags, sections, maker if question is None else TaughtRows(maker, question))
    register_rewards(tok, prompt)
    use_rlhf_trainers(lambda trainer: trainer.add_callback(_KeptSettings(trainer, flags, sections, prompt)))


class _KeptSettings(TrainerCallback):
    """Writes resolved_config.json at the start, and the prompt into every checkpoint."""

    def __init__(self, trainer: Any, flags: PluginFlags, sections: Sections, prompt: Prompt) -> None:
        self._prompt = complete_prompt(prompt, trainer.template)
        args = trainer.args
        derived = derive(
            world_size=args.world_size,
            per_device_batch_size=args.per_device_train_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            max_steps=args.max_steps,
            num_epochs=args.num_train_epochs,
        )
        self._resolved = resolved_config(
            RLHF, sections, flags.swift, derived=derived,
            context={"command": shlex.join(sys.argv), "versions": installed_versions()},
        )  # fmt: skip

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_resolved(args.output_dir, self._resolved)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_prompt(folder, self._prompt)
            write_pixel_limits(folder, self._prompt.min_pixels, self._prompt.max_pixels)


def _variant_problems(flags: PluginFlags, sections: Sections) -> list[Problem]:
    written = {
        "--custom_trainer_variant": flags.variant,
        "custom.trainer_variant": sections.custom.trainer_variant,
    }
    text = "has no effect with swift rlhf, whose trainer follows from rlhf_type; remove it."
    return [
        Problem(name, text, value=value, place=COMMAND_LINE)
        for name, value in written.items()
        if value is not None
    ]


def _problems(flags: PluginFlags, sections: Sections) -> list[Problem]:
    return [
        *swift_not_built(flags.swift),
        *check_sections_fit(sections, RLHF),
        *run_problems(RLHF, sections, flags.swift, _as_flag, lambda _path: None),
    ]


def _as_flag(name: str) -> tuple[str, Place | None]:
    return f"--{name}", COMMAND_LINE
