"""A run that ends before its last step: by a rule (exit code 4), or since it has reached what it was for.

All ranks after the same step, with a checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl

from coordexp.config import Sections
from coordexp.config.schema.training import Goal
from coordexp.control.acceptance import Criterion, Judgement, judge
from coordexp.errors import EXIT_STOPPED, ConfigError, CoordExpError
from coordexp.metrics.best import why_not_reported

logger = logging.getLogger(__name__)


class StoppedByRuleError(CoordExpError):
    """A rule of `telemetry.stop_on` held; the run has been saved."""

    exit_code = EXIT_STOPPED


class StopOnRule(TrainerCallback):
    """Ends training at the step at whose end all ranks know that the main process asks for it.

    stop_on: `telemetry.stop_on`, the same on all ranks. Stands behind all callbacks that decide about saving.
    """

    def __init__(self, stop_on: list[str]) -> None:
        self._stop_on = tuple(stop_on)
        self.rule: str | None = None
        """The rule that ends the run; None while none does."""

    def agree(self, asked: int) -> None:
        """asked: 1 + index of the rule, 0 for none; the same on all ranks."""
        if asked and self.rule is None:
            self.rule = self._stop_on[asked - 1]

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if self.rule is not None:
            control.should_save = control.should_training_stop = True
        return control

    def raise_if_stopped(self, step: int) -> None:
        """Raises StoppedByRuleError where the run has ended for a rule, at optimizer step `step`."""
        if self.rule is not None:
            raise StoppedByRuleError(
                f"stopped after step {step} by the rule {self.rule} (telemetry.stop_on); checkpoint-{step} is saved. "
                "`coordexp doctor` on the run folder says what it found. To go on nevertheless, resume from that "
                "checkpoint without the rule in telemetry.stop_on."
            )


class StopWhenReached:
    """Ends training, saved, at the first evaluation in which every goal of `training.stop_when` is met.

    Evaluations give the same numbers on all ranks, so that all of them end.
    """

    def __init__(self, goals: Sequence[Goal]) -> None:
        self._goals = tuple(Criterion(goal.metric, goal.op, goal.value) for goal in goals)
        self.is_reached = False

    @classmethod
    def of_run(cls, sections: Sections, variant: str) -> StopWhenReached:
        """Raises ConfigError for a goal that the run's evaluations do not report."""
        goals = sections.training.stop_when
        for index, goal in enumerate(goals):
            reason = why_not_reported(goal.metric, variant, sections)
            if reason is not None:
                raise ConfigError(f"training.stop_when[{index}].metric = {goal.metric!r}: {reason}")
        return cls(goals)

    def look(self, step: int, metrics: Mapping[str, float], control: TrainerControl, *, saves: bool) -> None:
        """Judge an evaluation. metrics: as logged.  saves: whether the run saves checkpoints at all."""
        if not self._goals:
            return
        found = [
            judge(goal, [(step, float(metrics[goal.metric]))] if goal.metric in metrics else [])
            for goal in self._goals
        ]
        if all(one.passed for one in found):
            self.is_reached = control.should_training_stop = True
            control.should_save = control.should_save or saves
            logger.info("Step %d reached %s: the run ends here (training.stop_when).", step, _all_of(found))


def _all_of(found: Sequence[Judgement]) -> str:
    return " and ".join(f"{one.criterion} ({one.found:.6g})" for one in found)
