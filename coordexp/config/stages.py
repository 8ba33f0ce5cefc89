"""A stages file: run files in order, where each starts, and what it must reach before the next one may."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from coordexp.config.schema.section import Section

Value = bool | int | float | str | list[bool | int | float | str] | None


class StartFrom(Section):
    """The checkpoint of an earlier stage that takes the place of the run file's model."""

    stage: str = Field(description="Name of an earlier stage.")
    checkpoint: Literal["best", "last"] | int = Field(
        default="best",
        description="best: by the stage's metric_for_best_model. last: of its last step. A number: of that step.",
    )


class OfStage(Section):
    """A number that an earlier stage, or the stage itself, has logged."""

    stage: str | None = Field(
        default=None, description="Name of an earlier stage. null: the stage itself; then of another metric."
    )
    metric: str | None = Field(default=None, description="null: the metric that is compared.")
    at: Literal["last", "best"] = Field(
        default="last",
        description="last: its last record. best: the evaluation of the stage's best checkpoint.",
    )


class AcceptRule(Section):
    """A number that a stage must reach."""

    metric: str = Field(description="A key of the catalogue as it is logged, `eval_` included.")
    op: Literal[">=", ">", "<=", "<"] = Field(description="How it has to stand to the value.")
    value: float = Field(description="What it is compared with.")
    of: OfStage | None = Field(
        default=None,
        description="It is compared with `value` times this number: `value: 0.9, of: {stage: text}` asks for nine "
        "tenths of what stage text reached.",
    )
    window: int = Field(default=1, ge=1, description="Records in a row whose mean is compared.")
    by_step: int | None = Field(
        default=None,
        ge=0,
        description="It has to be reached at this step or before. null: by the last records of the stage.",
    )
    on_fail: Literal["stop", "warn", "back_to_best"] = Field(
        default="stop",
        description="stop: no later stage starts, exit code 3. warn: it is said. back_to_best: later stages start from "
        "the best checkpoint, whatever they ask for.",
    )


class Stage(Section):
    """One training run."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="Of its folder below `output_dir`."
    )
    run: str = Field(description="Its run file, relative to the stages file.")
    overrides: dict[str, Value] = Field(
        default={},
        description="Settings in place of the run file's, as on the command line: dotted path of ours, or argument of "
        "ms-swift, and value.",
    )
    start_from: StartFrom | None = Field(
        default=None, description="null: from the model that the run file names."
    )
    accept: list[AcceptRule] = Field(default=[], description="What it must reach; all of it.")
    stop_when_accepted: bool = Field(
        default=False,
        description="End it at the first evaluation that meets all of `accept` (as `training.stop_when`), which then "
        "may hold numbers of evaluations only, without `window`, `by_step` and `of`.",
    )


class StagesFile(Section):
    """Training runs one after another (`coordexp run FILE`)."""

    output_dir: str = Field(description="Folder of all stages, relative to the working folder.")
    verify_best: bool = Field(
        default=True,
        description="Load the best checkpoint of every stage again in a fresh process and hold its score against the "
        "logged one before the next stage starts (`coordexp verify-best`).",
    )
    stages: list[Stage] = Field(min_length=1, description="In the order in which they run.")
