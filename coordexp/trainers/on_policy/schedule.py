"""Which parts an evaluation of stage 1 has: the teacher-forced loss, the model's own answers, or both."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState


class EvaluationParts(NamedTuple):
    """What an evaluation runs."""

    teacher_forced: bool
    rollouts: bool


class RolloutEvalSchedule(TrainerCallback):
    """`custom.rollout_eval.every_steps`. Stands after the callback of the HF Trainer that asks for evaluations.

    every_steps: None for rollouts with each evaluation.
    """

    def __init__(self, every_steps: int | None) -> None:
        self._every_steps = every_steps
        self._coming: EvaluationParts | None = None

    def take(self) -> EvaluationParts:
        """The parts of the evaluation that begins now; all of them where no step asked for it."""
        parts, self._coming = self._coming, None
        return parts or EvaluationParts(teacher_forced=True, rollouts=True)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        every = self._every_steps
        return self._decide(control, is_due=every is not None and state.global_step % every == 0)

    def on_epoch_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        return self._decide(control, is_due=False)  # the last step of the epoch has had its turn

    def _decide(self, control: TrainerControl, *, is_due: bool) -> TrainerControl:
        asked = bool(control.should_evaluate)
        rollouts = asked if self._every_steps is None else is_due
        if asked or rollouts:
            self._coming = EvaluationParts(teacher_forced=asked, rollouts=rollouts)
            control.should_evaluate = True
        return control
