"""What a cell runs: the command of its training, and everything that decides what comes out of it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordexp.config import config_hash, load_run_config
from coordexp.config.run.run_config import RunConfig
from coordexp.errors import ConfigError
from coordexp.files import is_file
from coordexp.inference.fingerprint import file_fingerprint
from coordexp.shipped import recipe_file
from coordexp.study.assets import DataFiles, data_files, start_model
from coordexp.study.plan import Cell, Study
from coordexp.study.records import chosen_checkpoint, identity_of
from coordexp.study.schema import BEST, StudyRecipe

SETTLED = frozenset(
    {"model", "dataset", "val_dataset", "seed", "data_seed", "output_dir", "max_steps", "save_steps"}
)
"""Arguments that the study sets; overrides may not."""
_KEEP_ALL = "1000"


@dataclass(frozen=True)
class TrainingJob:
    """A training process.

    command: without the flag that resumes.  start: the model folder.  steps: 0 where nothing is trained.
    made_from: what decides the weights that come out; identity: its hash.
    """

    command: tuple[str, ...]
    start: Path
    steps: int
    made_from: Mapping[str, Any]

    @property
    def identity(self) -> str:
        """See `made_from`."""
        return identity_of(self.made_from)


def training_job(study: Study, cell: Cell, done: Mapping[Cell, Mapping[str, Any]]) -> TrainingJob:
    """The training of a cell. done: `cell.json` of the cells that it needs.

    Raises ConfigError naming the recipe where its file or its overrides are wrong.
    """
    data = data_files(study, cell.data)
    origin = study.start_of(cell)
    if origin is not None:
        other, which = origin
        if done[other]["steps"]:
            start = chosen_checkpoint(study.folder_of(other), which)
        else:
            start = Path(done[other]["checkpoint"])
        start_from = {"identity": done[other]["identity"], "checkpoint": start.name}
    else:
        model = start_model(study, cell)
        start, start_from = model.path, model.made_from
    steps = _steps(study, cell, done)
    common = {"seed": cell.seed, "data": data.made_from, "start": start_from, "steps": steps}
    if not steps:
        return TrainingJob((), start, 0, {"command": "none", **common})
    places = _Places(start, data, study.folder_of(cell))
    return TrainingJob(
        command=_command(study, cell, places, steps),
        start=start,
        steps=steps,
        made_from={**_way_of(study, cell.recipe, steps), **common},
    )


def check_recipes(study: Study) -> None:
    """ConfigError naming the recipe and what is wrong with its run file or its overrides."""
    for name, recipe in study.file.recipes.items():
        if recipe.budget.steps == 0:
            continue
        if recipe.command != "train":
            if not is_file(recipe_file(str(recipe.config))):
                raise ConfigError(f"{study.path}: recipes.{name}.config: {recipe.config} does not exist.")
            if recipe.budget.steps is None and recipe.budget.seconds_of is None:
                raise ConfigError(f"{study.path}: recipes.{name}.budget: say how many steps it trains.")
            continue
        _check_overrides(study, name)
        config = _resolved(study, name)
        if recipe.budget.seconds_of is None and _max_steps(study, name, config) < 1:
            raise ConfigError(
                f"{study.path}: recipes.{name}.budget: say how many steps it trains; {recipe.config} has no max_steps."
            )
        if _is_best_wanted(study, name) and config.swift.get("eval_strategy") == "no":
            raise ConfigError(
                f"{study.path}: recipes.{name}: its best checkpoint is asked for, which evaluations during training "
                "find; give it overrides: {eval_strategy: steps, eval_steps: N}."
            )


@dataclass(frozen=True)
class _Places:
    start: Path
    data: DataFiles
    output: Path


def _command(study: Study, cell: Cell, places: _Places, steps: int) -> tuple[str, ...]:
    recipe = study.recipe_of(cell)
    seed = str(cell.seed)
    settled = [
        "--model", str(places.start), "--seed", seed, "--data_seed", seed, "--max_steps", str(steps),
        "--output_dir", str(places.output), *_saving(study, cell.recipe, steps),
    ]  # fmt: skip
    if recipe.command == "train":
        entry = ["coordexp.cli.main", "train", str(recipe.config)]
        flags = [*_flags(study, cell.recipe), *_data_flags(study, cell.recipe, places.data), *settled]
    else:
        entry = ["swift.cli.main", recipe.command, str(recipe_file(str(recipe.config)))]
        flags = [
            "--dataset",
            str(places.data.train),
            "--val_dataset",
            str(places.data.val),
            "--add_version",
            "false",
        ]
        flags += [word for name, value in recipe.overrides.items() for word in (f"--{name}", *_words(value))]
        flags += settled
    return (sys.executable, "-m", *entry, *flags)


def _flags(study: Study, name: str) -> list[str]:
    """What the study says of every run, then what is written for all recipes, then for this one."""
    usual = ["--add_version", "false", "--eval_strategy", "no", "--report_to", "none"]
    overrides = {**study.file.overrides, **study.file.recipes[name].overrides}
    return [
        *usual,
        *(word for key, value in overrides.items() for word in ("--set", f"{key}={json.dumps(value)}")),
    ]


def _data_flags(study: Study, name: str, data: DataFiles) -> list[str]:
    """In the form of the run file: our keys where it uses them, ms-swift's otherwise."""
    if _resolved(study, name).custom.train_jsonl is None:
        return ["--dataset", str(data.train), "--val_dataset", str(data.val)]
    files = {"train_jsonl": str(data.train), "val_jsonl": str(data.val)}
    return [word for key, path in files.items() for word in ("--set", f"custom.{key}={json.dumps([path])}")]


def _saving(study: Study, name: str, steps: int) -> list[str]:
    """Checkpoints to resume from; all are kept where another recipe starts from one of them."""
    recipe = study.file.recipes[name]
    wanted = [step for step in _wanted_checkpoints(study, name) if isinstance(step, int)]
    if any(step > steps for step in wanted):
        raise ConfigError(
            f"{study.path}: recipes.{name} trains {steps} steps; checkpoint {max(wanted)} is asked for."
        )
    every = recipe.save_steps or math.ceil(steps / 4)
    if wanted:
        every = math.gcd(every, *wanted) if recipe.save_steps else math.gcd(*wanted)
    limit = _KEEP_ALL if wanted else "1"
    return ["--save_strategy", "steps", "--save_steps", str(every), "--save_total_limit", limit]


def _wanted_checkpoints(study: Study, name: str) -> list[int | str]:
    starts = [recipe.start_from for recipe in study.file.recipes.values() if recipe.start_from is not None]
    return [study.file.recipes[name].checkpoint, *(s.checkpoint for s in starts if s.recipe == name)]


def _is_best_wanted(study: Study, name: str) -> bool:
    return BEST in _wanted_checkpoints(study, name)


def _steps(study: Study, cell: Cell, done: Mapping[Cell, Mapping[str, Any]]) -> int:
    budget = study.recipe_of(cell).budget
    if budget.steps is not None:
        return budget.steps
    if budget.seconds_of is None:
        return _max_steps(study, cell.recipe, _resolved(study, cell.recipe))
    there, alike = (
        done[Cell(cell.data, str(name), cell.seed)] for name in (budget.seconds_of, budget.measured_on)
    )
    seconds = [seconds_of_steps(record["cost"], budget.clock) for record in (there, alike)]
    for record, value in zip((there, alike), seconds, strict=True):
        if not value:
            recipe = record["cell"]["recipe"]
            raise ConfigError(f"{cell}: nothing says how many seconds the steps of {recipe} took.")
    return steps_within(seconds[0], seconds[1] / alike["steps"])


def seconds_of_steps(cost: Mapping[str, Any], clock: str) -> float:
    """Seconds that the optimizer steps of a cell took, 0 where nothing says so.

    clock: "cpu" takes the share of them in which its process was computing.
    """
    seconds = float(cost["train_s"] or 0.0)
    return seconds if clock == "wall" else seconds * float(cost.get("train_cpu_share", 0.0))


def steps_within(seconds: float, seconds_per_step: float) -> int:
    """Whole steps that fit, at least one."""
    return max(1, math.floor(seconds / seconds_per_step))


def _max_steps(study: Study, name: str, config: RunConfig) -> int:
    steps = study.file.recipes[name].budget.steps
    return int(config.swift.get("max_steps") or 0) if steps is None else steps


def _way_of(study: Study, name: str, steps: int) -> dict[str, Any]:
    """How a recipe trains, without where from and where to."""
    recipe = study.file.recipes[name]
    if recipe.command == "train":
        run = _resolved(study, name, steps)
        settings = config_hash(run.variant, run.sections, run.swift, without_defaults=True)
        return {"command": "train", "config_hash": settings}
    return {
        "command": recipe.command,
        "config_hash": file_fingerprint(recipe_file(str(recipe.config))),
        "overrides": recipe.overrides,
    }


def _resolved(study: Study, name: str, steps: int | None = None) -> RunConfig:
    """The run file of a recipe with its overrides; model and data have names that are the same everywhere."""
    recipe = study.file.recipes[name]
    settled = ["--model", "start"] + ([] if steps is None else ["--max_steps", str(steps)])
    try:
        return load_run_config(str(recipe.config), [*_flags(study, name), *settled])
    except ConfigError as error:
        raise ConfigError(f"{study.path}: recipes.{name}: {error}") from None


def _check_overrides(study: Study, name: str) -> None:
    for where, overrides in (
        ("overrides", study.file.overrides),
        (f"recipes.{name}.overrides", study.file.recipes[name].overrides),
    ):
        taken = sorted(SETTLED & overrides.keys())
        if taken:
            raise ConfigError(
                f"{study.path}: {where}.{taken[0]}: the study sets it (model, data, seeds, budget, save_steps)."
            )


def _words(value: Any) -> Sequence[str]:
    values = value if isinstance(value, list) else [value]
    return [v if isinstance(v, str) else json.dumps(v) for v in values]


__all__ = ["StudyRecipe", "TrainingJob", "check_recipes", "seconds_of_steps", "steps_within", "training_job"]
