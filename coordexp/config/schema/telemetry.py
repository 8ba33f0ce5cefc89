"""The `telemetry` section: what watches a run. Nothing here changes what a run computes; `stop_on` may end it."""

from __future__ import annotations

from pydantic import Field

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


class Telemetry(Section):
    """What watches a run."""

    rules: list[UserRule] = Field(
        default=[], description="Rules beside the built-in ones (runbooks/rules.md)."
    )
    silenced: list[str] = Field(default=[], description="Names of rules that are not judged.")
    stop_on: list[str] = Field(
        default=[],
        description="Names of rules that end the run: with a checkpoint, on all ranks after the same step, with exit "
        "code 4.",
    )
