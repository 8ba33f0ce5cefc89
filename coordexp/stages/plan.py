"""From a stages file to checked stages. No torch: `coordexp config check` comes here too."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordexp.config import RunConfig, Sections, load_run_config
from coordexp.config.checks.problems import Problem, closest, raise_problems
from coordexp.config.checks.validation import validate
from coordexp.config.checks.yaml_tree import Tree, read_yaml
from coordexp.config.run.run_problems import RunCheck
from coordexp.config.stages import AcceptRule, Stage, StagesFile
from coordexp.control.acceptance import VERDICT_FILE, Criterion, OnFail, Reference
from coordexp.errors import ConfigError
from coordexp.metrics.best import why_not_reported
from coordexp.metrics.catalog import EVAL_PREFIX, lookup
from coordexp.shipped import recipe_file

STAGES_KEY = "stages"
"""By this a stages file is told from a run file."""
LORA = "lora"
FULL = "full"


@dataclass(frozen=True)
class PlannedStage:
    """A checked stage.

    run: its run file.  words: its overrides as on the command line.  output: its run folder.
    config: the run as it will be, but for the checkpoint it starts from, which is not there yet.
    start: (name of the earlier stage; best, last or checkpoint-STEP) that it starts from.
    """

    name: str
    run: Path
    words: tuple[str, ...]
    output: Path
    config: RunConfig
    criteria: tuple[Criterion, ...]
    start: tuple[str, str] | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether its checkpoints hold an adapter and not a whole model."""
        return str(self.config.swift.get("tuner_type", LORA)) != FULL

    @property
    def log(self) -> Path:
        """Console of its training."""
        return self.output.with_name(f"{self.name}.log")


@dataclass(frozen=True)
class StagePlan:
    """All stages of a file. verify_best: whether best checkpoints are scored again between them."""

    path: Path
    output: Path
    stages: tuple[PlannedStage, ...]
    verify_best: bool = True

    @property
    def verdict_file(self) -> Path:
        """Where the verdict on all stages is written."""
        return self.output / VERDICT_FILE

    def index(self, name: str) -> int:
        """Place of the stage of that name; ConfigError where there is none."""
        names = [stage.name for stage in self.stages]
        if name not in names:
            raise ConfigError(f"{self.path}: no stage is called {name!r}{_instead(name, names)}")
        return names.index(name)


def load_stages(
    path: str | Path, *, checks: Sequence[RunCheck] = (), overrides: Mapping[str, Sequence[str]] | None = None
) -> StagePlan:
    """Read a stages file and the run files of all its stages.

    checks: of each run, as for `load_run_config`.
    overrides: further command-line words by name of a stage, behind its own.

    Raises:
        ConfigError: every problem of the file with dotted path and line, or all problems of a stage's run.
    """
    path = recipe_file(path)
    tree = read_yaml(path)
    file, problems = validate(StagesFile, tree)
    raise_problems(problems)
    assert file is not None
    raise_problems(_order_problems(file, tree))
    output = Path(file.output_dir)
    stages: dict[str, PlannedStage] = {}
    for index, stage in enumerate(file.stages):
        more = (overrides or {}).get(stage.name, ())
        stages[stage.name] = _planned(stage, index, tree, path, output, stages, checks, more)
    problems = [
        problem
        for index, stage in enumerate(file.stages)
        for problem in _run_problems(stage, index, stages, tree)
    ]
    raise_problems(problems)
    return StagePlan(path, output, tuple(stages.values()), file.verify_best)


def start_words(stage: PlannedStage, checkpoint: str, base: str | None = None) -> list[str]:
    """Command-line words that let a stage start from a checkpoint. base: the model under it, where it is an adapter."""
    if base is None:
        return ["--model", checkpoint]
    if not stage.is_adapter:
        raise ConfigError(
            f"stage {stage.name} trains the whole model (tuner_type: {FULL}), but {checkpoint} holds an adapter; merge "
            "it with `coordexp model merge` in between, or train an adapter."
        )
    return ["--model", base, "--adapters", checkpoint]


def _planned(
    stage: Stage,
    index: int,
    tree: Tree,
    path: Path,
    output: Path,
    earlier: Mapping[str, PlannedStage],
    checks: Sequence[RunCheck],
    more: Sequence[str],
) -> PlannedStage:
    run, folder = Path(os.path.normpath(path.parent / stage.run)), output / stage.name
    words = [word for name, value in stage.overrides.items() for word in ("--set", _assignment(name, value))]
    if stage.stop_when_accepted:
        goals = [rule.model_dump(include={"metric", "op", "value"}) for rule in stage.accept]
        words += ["--set", _assignment("training.stop_when", goals)]
    words += [*more, "--output_dir", str(folder), "--add_version", "false"]
    coming: list[str] = []
    if stage.start_from is not None:
        source = earlier[stage.start_from.stage]
        checkpoint = str(source.output / _folder_of(stage.start_from.checkpoint))
        coming = ["--adapters", checkpoint] if source.is_adapter else ["--model", checkpoint]
    where = f"stages[{index}] ({stage.name}) in {tree.place(('stages', index))}"
    try:
        config = load_run_config(run, [*words, *coming], checks=[_without(checks, bool(coming))])
    except ConfigError as error:
        raise ConfigError(f"{where}: {run}: {error}") from None
    return PlannedStage(
        name=stage.name,
        run=run,
        words=tuple(words),
        output=folder,
        config=config,
        criteria=tuple(_criterion(rule) for rule in stage.accept),
        start=None
        if stage.start_from is None
        else (stage.start_from.stage, _folder_of(stage.start_from.checkpoint)),
    )


def _folder_of(checkpoint: str | int) -> str:
    """best, last, or the name of a checkpoint's folder."""
    return f"checkpoint-{checkpoint}" if isinstance(checkpoint, int) else checkpoint


def _without(checks: Sequence[RunCheck], starts_later: bool) -> RunCheck:
    """All `checks` as one, without what they say of a checkpoint that an earlier stage is going to write."""

    def check(variant: str, sections: Sections, swift: Mapping[str, Any], written: Any) -> list[Problem]:
        known = {
            name: value
            for name, value in swift.items()
            if not (starts_later and name in ("model", "adapters"))
        }
        return [problem for one in checks for problem in one(variant, sections, known, written)]

    return check


def _assignment(name: str, value: Any) -> str:
    """What `--set` takes: a path and a YAML value on one line."""
    return f"{name}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"


def _criterion(rule: AcceptRule) -> Criterion:
    of = rule.of
    reference = None if of is None else Reference(of.metric or rule.metric, of.stage, of.at)
    on_fail = OnFail(rule.on_fail)
    return Criterion(rule.metric, rule.op, rule.value, rule.window, rule.by_step, on_fail, reference)


def _order_problems(file: StagesFile, tree: Tree) -> list[Problem]:
    """Names that stand twice, and starts from stages that do not come before."""
    problems, names = [], list[str]()
    for index, stage in enumerate(file.stages):
        if stage.name in names:
            path = f"stages[{index}].name"
            place = tree.place(("stages", index, "name"))
            problems.append(Problem(path, "another stage has this name.", stage.name, place))
        start = stage.start_from
        if start is not None and start.stage not in names:
            path, place = (
                f"stages[{index}].start_from.stage",
                tree.place(("stages", index, "start_from", "stage")),
            )
            text = f"no earlier stage has this name{_instead(start.stage, names)}"
            problems.append(Problem(path, text, start.stage, place))
        problems += _reference_problems(stage, index, names, tree)
        names.append(stage.name)
    return problems


def _reference_problems(stage: Stage, index: int, names: Sequence[str], tree: Tree) -> list[Problem]:
    """Criteria that compare with a stage which does not come before, or with themselves."""
    problems = []
    for number, rule in enumerate(stage.accept):
        if rule.of is None:
            continue
        path, where = f"stages[{index}].accept[{number}].of", ("stages", index, "accept", number, "of")
        if rule.of.stage is None and rule.of.metric in (None, rule.metric):
            text = "compares a number with itself; name an earlier stage, or another metric of this one."
            problems.append(Problem(path, text, rule.of.metric, tree.place(where)))
        elif rule.of.stage is not None and rule.of.stage not in names:
            text = f"no earlier stage has this name{_instead(rule.of.stage, names)}"
            problems.append(Problem(f"{path}.stage", text, rule.of.stage, tree.place((*where, "stage"))))
    return problems


def _compared_problems(
    stage: Stage, index: int, stages: Mapping[str, PlannedStage], tree: Tree
) -> list[Problem]:
    """Numbers that the stage with which a criterion compares does not log, or has no best checkpoint for."""
    problems = []
    for number, rule in enumerate(stage.accept):
        if rule.of is None:
            continue
        path, where = f"stages[{index}].accept[{number}].of", ("stages", index, "accept", number, "of")
        name, metric = rule.of.stage or stage.name, rule.of.metric or rule.metric
        config = stages[name].config
        text = _unknown_metric(metric, config)
        if text is not None:
            text = f"of stage {name}: {text}"
            problems.append(Problem(f"{path}.metric", text, metric, tree.place((*where, "metric"))))
        elif rule.of.at == "best" and not (metric.startswith(EVAL_PREFIX) and _keeps_best(config)):
            text = f"stage {name} has no evaluation of a best checkpoint with {metric}; write at: last."
            problems.append(Problem(f"{path}.at", text, rule.of.at, tree.place((*where, "at"))))
    return problems


def _run_problems(stage: Stage, index: int, stages: Mapping[str, PlannedStage], tree: Tree) -> list[Problem]:
    """Numbers that nobody logs, and checkpoints that nobody writes."""
    problems, config = [], stages[stage.name].config
    for number, rule in enumerate(stage.accept):
        path = f"stages[{index}].accept[{number}]"
        text = _unknown_metric(rule.metric, config)
        if text is not None:
            place = tree.place(("stages", index, "accept", number, "metric"))
            problems.append(Problem(f"{path}.metric", text, rule.metric, place))
        if OnFail(rule.on_fail) is OnFail.BACK_TO_BEST and not _keeps_best(config):
            place = tree.place(("stages", index, "accept", number, "on_fail"))
            text = "the stage has no best checkpoint: it needs evaluations and a save_strategy."
            problems.append(Problem(f"{path}.on_fail", text, rule.on_fail, place))
    problems += _compared_problems(stage, index, stages, tree)
    problems += _goal_problems(stage, index, tree)
    start = stage.start_from
    if start is not None:
        source, path = stages[start.stage].config, f"stages[{index}].start_from.checkpoint"
        place = tree.place(("stages", index, "start_from", "checkpoint"))
        if start.checkpoint == "best" and not _keeps_best(source):
            text = f"stage {start.stage} has no best checkpoint: it needs evaluations and a save_strategy."
            problems.append(Problem(path, text, start.checkpoint, place))
        elif _save_strategy(source) == "no":
            text = f"stage {start.stage} saves nothing (save_strategy: no)."
            problems.append(Problem(path, text, start.checkpoint, place))
    return problems


def _goal_problems(stage: Stage, index: int, tree: Tree) -> list[Problem]:
    """Criteria that one evaluation cannot meet by itself."""
    if not stage.stop_when_accepted:
        return []
    path, place = f"stages[{index}].stop_when_accepted", tree.place(("stages", index, "stop_when_accepted"))
    if not stage.accept:
        return [Problem(path, "there is nothing to accept: `accept` is empty.", True, place)]
    return [
        Problem(path, f"accept[{number}] is not met by one evaluation: it needs a key of `eval_`, window 1, no by_step "
                "and no `of`.", True, place)
        for number, rule in enumerate(stage.accept)
        if not rule.metric.startswith(EVAL_PREFIX)
        or rule.window != 1
        or rule.by_step is not None
        or rule.of is not None
    ]  # fmt: skip


def _unknown_metric(key: str, config: RunConfig) -> str | None:
    """What is wrong with the metric of a criterion, None where nothing is."""
    if lookup(key) is not None and not key.startswith(EVAL_PREFIX):
        return None
    if lookup(key) is not None and not _evaluates(config):
        return "the stage has no evaluation (eval_strategy, custom.rollout_eval.every_steps)."
    return why_not_reported(key, config.variant, config.sections)


def _evaluates(config: RunConfig) -> bool:
    own = config.custom.rollout_eval
    has_data = (
        bool(config.swift.get("val_dataset")) or float(config.swift.get("split_dataset_ratio") or 0) > 0
    )
    strategy = config.swift.get("eval_strategy") or _save_strategy(config)  # as ms-swift fills it in
    return has_data and (strategy != "no" or (own.enabled and own.every_steps is not None))


def _keeps_best(config: RunConfig) -> bool:
    return _evaluates(config) and _save_strategy(config) != "no"


def _save_strategy(config: RunConfig) -> str:
    return str(config.swift.get("save_strategy") or "steps")


def _instead(name: str, names: Sequence[str]) -> str:
    near = closest(name, names)
    listed = f"; there are {', '.join(names)}." if names else "; it is the first."
    return f"; did you mean {near}?" if near else listed
