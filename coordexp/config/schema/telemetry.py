"""The `telemetry` section: what watches a run. Nothing here changes what a run computes; `stop_on` may end it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from coordexp.config.schema.section import Section


class UserRule(Section):
    """One rule of your own; a rule with the name of a built-in one takes its place."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="What `stop_on` and findings call it.")
    key: str = Field(
        min_length=1, description="The number to watch, as logged (`eval_` for an evaluation's)."
    )
    condition: str = Field(
        min_length=1,
        description="When it is bad: clauses joined by `and`, such as `> 0.5`, `< 0.6 x best`, `< best - 0.1`, "
        "`> 3 x usual`, `falls < 1% in 200`, or with the name of another number first, `rollout/recall < 0.5`.",
    )
    for_steps: int = Field(
        default=0, ge=0, description="Optimizer steps for which the condition must have held."
    )
    for_records: int = Field(default=1, ge=1, description="Records in a row in which it must have held.")
    from_step: int = Field(default=0, ge=0, description="Records of earlier steps are not judged.")
    from_share: float = Field(
        default=0.0, ge=0, le=1, description="Nor are those before this share of the run's steps."
    )
    meaning: str = Field(min_length=1, description="What it means, without a full stop.")
    action: str = Field(min_length=1, description="What to do about it, without a full stop.")


class ConsoleSteps(Section):
    """Optimizer steps between the lines of a level. A line needs a record: none comes more often than logging_steps."""

    level_1: int = Field(default=1, gt=0, description="The line of a step.")
    level_2: int = Field(default=10, gt=0, description="The terms of the loss.")
    level_3: int = Field(default=50, gt=0, description="Schedule, packing, memory, and where the time goes.")


_FIRST_LEVEL = {"every_steps.level_2": 2, "every_steps.level_3": 3, "min_change": 4, "stall_after": 4}
"""Setting -> the first level that reads it."""


class ConsoleLevels(Section):
    """How much the console (and run.log) says; the whole record is in metrics.jsonl."""

    level: Literal[1, 2, 3, 4] = Field(
        default=4,
        description="1: a line a step. 2: also each term of the loss with its share. 3: also schedule, packing, memory "
        "and time. 4: at evaluations also what got better and worse.",
    )
    every_steps: ConsoleSteps = ConsoleSteps()
    min_change: float = Field(
        default=0.01,
        gt=0,
        lt=1,
        description="Smallest change of an evaluation number that counts: absolute of fractions, relative of others.",
    )
    stall_after: int = Field(
        default=3,
        gt=0,
        description="Evaluations without a better number than the best before them after which `[STALL]` is said.",
    )

    @model_validator(mode="after")
    def _is_read(self) -> ConsoleLevels:
        given = {
            *self.model_fields_set,
            *(f"every_steps.{name}" for name in self.every_steps.model_fields_set),
        }
        for name, level in _FIRST_LEVEL.items():
            if name in given and self.level < level:
                raise ValueError(f"{name} has no effect below level {level}; raise level, or remove it")
        return self


class GradientProbeSettings(Section):
    """Lengths and cosines of the gradients of the loss's terms (`gradient/*`)."""

    every_steps: int | None = Field(
        default=None,
        gt=0,
        description="Optimizer steps between measurements, the first step being one; null: off.",
    )


class TrajectoryProbeSettings(Section):
    """How the hidden states of a few fixed validation samples move from token to token (`trajectory/*`)."""

    every_steps: int | None = Field(
        default=None, gt=0, description="Optimizer steps between measurements; null: off."
    )
    num_samples: int = Field(default=4, gt=0, le=64, description="The first validation samples.")
    max_new_tokens: int = Field(
        default=256, gt=2, description="Tokens of an answer that are looked at, and generated at most."
    )
    eps: float = Field(default=1e-6, gt=0, description="Keeps variances and velocities from zero.")

    @model_validator(mode="after")
    def _is_on(self) -> TrajectoryProbeSettings:
        if self.every_steps is None and self.model_fields_set - {"every_steps"}:
            raise ValueError("has no effect without every_steps; give it, or remove trajectory_probe")
        return self


class Telemetry(Section):
    """What watches a run."""

    console: ConsoleLevels = ConsoleLevels()
    gradient_probe: GradientProbeSettings = GradientProbeSettings()
    trajectory_probe: TrajectoryProbeSettings = TrajectoryProbeSettings()
    rules: list[UserRule] = Field(
        default=[], description="Rules beside the built-in ones (runbooks/rules.md)."
    )
    silenced: list[str] = Field(default=[], description="Names of rules that are not judged.")
    stop_on: list[str] = Field(
        default=[],
        description="Names of rules that end the run: with a checkpoint, on all ranks after the same step, with exit "
        "code 4.",
    )
