"""A study file -> its cells, in an order in which each finds what it needs. Everything is checked before anything runs.

study = read_study("configs/study/objectives.yaml")
study.cells                            # those of the first seed first, a recipe after the ones it starts from
study.needs(cell)                      # the cells that must be done before
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from coordexp.config.checks.problems import KeyPath, Place, Problem, dotted, one_of, raise_problems
from coordexp.config.checks.validation import validate
from coordexp.config.checks.yaml_tree import Tree, read_yaml
from coordexp.errors import ConfigError
from coordexp.study.schema import LAST, METRICS, Checkpoint, StudyFile, StudyRecipe

OUTPUT = Path("runs/study")
AXES = ("data", "recipe", "seed")


@dataclass(frozen=True, order=True)
class Cell:
    """One run: a recipe on a data set with a seed."""

    data: str
    recipe: str
    seed: int

    @property
    def key(self) -> str:
        """Its name, and its folder below the study's."""
        return f"{self.data}/{self.recipe}/seed{self.seed}"

    def __str__(self) -> str:
        return self.key


@dataclass(frozen=True)
class Study:
    """A checked study. path: of its file."""

    path: Path
    file: StudyFile

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return Path(self.file.output) if self.file.output else OUTPUT / self.file.name

    @property
    def results_folder(self) -> Path:
        """Where the page and its numbers are written."""
        return self.folder / self.file.results if self.file.results else self.folder

    @cached_property
    def recipe_order(self) -> list[str]:
        """Names of the recipes, those that others need before them, otherwise as in the file."""
        names = list(self.file.recipes)
        sorter = TopologicalSorter({name: needed_recipes(self.file.recipes[name]) for name in names})
        sorter.prepare()
        order: list[str] = []
        while sorter.is_active():
            ready = sorted(sorter.get_ready(), key=names.index)
            order += ready
            sorter.done(*ready)
        return order

    @cached_property
    def cells(self) -> list[Cell]:
        """All cells: every comparison is complete for the first seed before the second begins."""
        return [
            Cell(data, recipe, seed)
            for seed in self.file.seeds
            for data in self.file.data
            for recipe in self.recipe_order
            if data in self.data_of(recipe)
        ]

    def data_of(self, recipe: str) -> list[str]:
        """The data sets that a recipe is run on."""
        only = self.file.recipes[recipe].only
        return [name for name in self.file.data if only is None or name in only]

    def recipe_of(self, cell: Cell) -> StudyRecipe:
        """How a cell is trained."""
        return self.file.recipes[cell.recipe]

    def start_of(self, cell: Cell) -> tuple[Cell, Checkpoint] | None:
        """The cell whose checkpoint this one goes on from, and which; None where it starts from the model."""
        start, data = self.recipe_of(cell).start_from, self.file.data[cell.data].start_from
        if start is not None:
            return Cell(cell.data, start.recipe, cell.seed), start.checkpoint
        return None if data is None else (Cell(data, cell.recipe, cell.seed), LAST)

    def needs(self, cell: Cell) -> list[Cell]:
        """Cells of the same seed that must be done before this one."""
        needed = {Cell(cell.data, name, cell.seed) for name in needed_recipes(self.recipe_of(cell))}
        start = self.start_of(cell)
        return sorted(needed if start is None else needed | {start[0]})

    def folder_of(self, cell: Cell) -> Path:
        """The run folder of a cell."""
        return self.folder / cell.key


def read_study(path: str | Path) -> Study:
    """The study in a file; ConfigError with every problem, each with dotted path and line."""
    tree = read_yaml(path)
    file, problems = validate(StudyFile, tree)
    if file is not None:
        problems = [*problems, *_problems(file, tree)]
    raise_problems(problems)
    if file is None:
        raise AssertionError("a study without a model has a problem")
    return Study(Path(path), file)


def needed_recipes(recipe: StudyRecipe) -> set[str]:
    """Names of the recipes whose cells come first."""
    start, budget = recipe.start_from, recipe.budget
    names = (start.recipe if start else None, budget.seconds_of, budget.measured_on)
    return {name for name in names if name is not None}


def selected(cells: Sequence[Cell], filters: Sequence[str]) -> list[Cell]:
    """The cells that `--only` names: `recipe=mix,ce data=few seed=1`; axes that are not named are not restricted.

    Raises ConfigError for an axis or a value that the study does not have.
    """
    wanted: dict[str, set[str]] = {}
    for word in filters:
        axis, equals, values = word.partition("=")
        if not equals or axis not in AXES:
            raise ConfigError(f"--only {word}: expected {', '.join(f'{name}=VALUE' for name in AXES)}.")
        wanted.setdefault(axis, set()).update(values.split(","))
    for axis, values_of_axis in wanted.items():
        known = dict.fromkeys(_on(cell, axis) for cell in cells)
        for value in sorted(values_of_axis - known.keys()):
            raise ConfigError(f"--only {axis}={value}: {one_of(value, list(known))}.")
    return [cell for cell in cells if all(_on(cell, axis) in values for axis, values in wanted.items())]


def _on(cell: Cell, axis: str) -> str:
    return {"data": cell.data, "recipe": cell.recipe, "seed": str(cell.seed)}[axis]


def _problems(file: StudyFile, tree: Tree) -> Iterator[Problem]:
    """What no single section can see."""
    recipes = list(file.recipes)

    def problem(path: KeyPath, text: str) -> Problem:
        place: Place | None = tree.place(path)
        return Problem(dotted(path), text, place=place)

    unknown = False
    for name in file.baseline:
        if name not in recipes:
            unknown = True
            yield problem(("baseline",), f"{one_of(name, recipes)}.")
        elif not file.recipes[name].is_evaluated:
            yield problem(("baseline",), f"{name} is not evaluated.")
    if file.results in file.data:
        yield problem(
            ("results",), "is a data set too, whose cells have a folder of that name; choose another."
        )
    if len(set(file.seeds)) < len(file.seeds):
        yield problem(("seeds",), "holds a seed twice.")
    for index, name in enumerate(file.headline):
        if name not in METRICS:
            yield problem(("headline", index), f"{one_of(name, list(METRICS))}.")
    headline = file.evaluate.of_headline
    if headline.coord not in file.evaluate.coord or headline.score not in file.evaluate.score:
        yield problem(("evaluate", "headline"), "is none of those that coord and score list.")
    for name, recipe in file.recipes.items():
        for path, found, choices in _references(file, name, recipe):
            if found not in choices:
                unknown = True
                yield problem(path, f"{one_of(found, choices)}.")
        if recipe.config is None and recipe.budget.steps != 0:
            yield problem(
                ("recipes", name),
                "needs config, a run file; or `budget: {steps: 0}` to evaluate what it starts from.",
            )
        for key, kept, chosen in (
            ("coord", recipe.coord, headline.coord),
            ("score", recipe.score, headline.score),
        ):
            if kept is not None and chosen not in kept:
                yield problem(("recipes", name, key), f"leaves out {chosen}, by which recipes are compared.")
        alike = file.recipes.get(recipe.budget.measured_on or "")
        if alike is not None and (alike.config, alike.overrides) != (recipe.config, recipe.overrides):
            yield problem(
                ("recipes", name, "budget", "measured_on"),
                f"trains with {alike.config} and its own overrides; its steps take another time.",
            )
        if recipe.model is not None and recipe.start_from is not None:
            yield problem(("recipes", name, "model"), "start_from names another start; keep one of them.")
    if not unknown:
        yield from _order_problems(file, problem)


def _references(file: StudyFile, name: str, recipe: StudyRecipe) -> Iterator[tuple[KeyPath, str, list[str]]]:
    """(where it is written, the name, the names there are) of what a recipe refers to."""
    others = [other for other in file.recipes if other != name]
    here: KeyPath = ("recipes", name)
    for index, data in enumerate(recipe.only or ()):
        yield (*here, "only", index), data, list(file.data)
    if recipe.start_from is not None:
        yield (*here, "start_from", "recipe"), recipe.start_from.recipe, others
    for key, other in (
        ("seconds_of", recipe.budget.seconds_of),
        ("measured_on", recipe.budget.measured_on),
    ):
        if other is not None:
            yield (*here, "budget", key), other, others


def _order_problems(file: StudyFile, problem: Any) -> Iterator[Problem]:
    study = Study(Path(), file)
    try:
        _ = study.recipe_order
    except CycleError as error:
        yield problem(("recipes",), f"need each other in a circle: {' -> '.join(error.args[1])}.")
        return
    for name, recipe in file.recipes.items():
        for other in sorted(needed_recipes(recipe)):
            missing = [data for data in study.data_of(name) if data not in study.data_of(other)]
            if missing:
                text = f"needs {other}, which is not run on {', '.join(missing)}; widen its `only`."
                yield problem(("recipes", name), text)
    yield from _start_problems(study, problem)
    compared = {data for baseline in file.baseline for data in study.data_of(baseline)}
    for data in file.data:
        on_it = [
            name for name, how in file.recipes.items() if how.is_evaluated and data in study.data_of(name)
        ]
        if len(on_it) > 1 and data not in compared:
            text = f"is not run on {data}, where {' and '.join(on_it)} have to be compared with it."
            yield problem(("baseline",), text)


def _start_problems(study: Study, problem: Any) -> Iterator[Problem]:
    """Data sets that go on from others: which must come before, with the same recipes."""
    before: list[str] = []
    for name, data in study.file.data.items():
        if data.start_from is not None and data.start_from not in before:
            text = (
                f"{one_of(data.start_from, before)}." if before else "the first data set has none before it."
            )
            yield problem(("data", name, "start_from"), text)
        elif data.start_from is not None:
            for recipe, how in study.file.recipes.items():
                runs_on = study.data_of(recipe)
                if how.start_from is None and name in runs_on and data.start_from not in runs_on:
                    text = f"{recipe} is not run on {data.start_from}; widen its `only`."
                    yield problem(("data", name, "start_from"), text)
        before.append(name)
