"""A run that a rule ends: all ranks after the same step, with a checkpoint, with exit code 4."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl

from coordexp.errors import EXIT_STOPPED, CoordExpError


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
