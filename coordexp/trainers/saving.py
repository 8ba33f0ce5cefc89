"""When checkpoints are saved beyond what the HF Trainer decides: not before a step, and at the last one or not."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import SaveStrategy

from coordexp.config.schema.training import Training


class SaveSchedule(TrainerCallback):
    """`training.save_delay_steps` and `training.save_last_epoch`. Stands after the callback that asks for saves."""

    def __init__(self, settings: Training) -> None:
        self._delay = settings.save_delay_steps
        self._last = settings.save_last_epoch

    def is_too_early(self, state: TrainerState) -> bool:
        """Whether nothing may be saved yet, and no evaluation may pick the best checkpoint."""
        return state.global_step < self._delay

    def must_save(self, state: TrainerState) -> bool:
        """Whether this is the last step, and it is saved whatever else is decided."""
        return self._last is True and state.global_step >= state.max_steps

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        is_last = state.global_step >= state.max_steps
        if is_last and self._last is False and args.save_strategy == SaveStrategy.STEPS:
            control.should_save = state.save_steps > 0 and state.global_step % state.save_steps == 0
        return self._decide(state, control)

    def on_epoch_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        return self._decide(state, control, may_force=False)  # the last step has been saved at its end

    def _decide(
        self, state: TrainerState, control: TrainerControl, *, may_force: bool = True
    ) -> TrainerControl:
        if self.is_too_early(state):
            control.should_save = False
        if may_force and self.must_save(state):
            control.should_save = True
        return control
