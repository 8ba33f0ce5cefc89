"""The schedule of a run's learning rate, as the HF Trainer will make it."""

from __future__ import annotations

from typing import Any

from coordexp.control.lr_schedule import LrSchedule


def lr_schedule(args: Any, total_steps: int | None) -> LrSchedule:
    """args: of the trainer.  total_steps: of the run; None where it is not known."""
    warmup_steps = args.get_warmup_steps(total_steps or 0)
    options = args.lr_scheduler_kwargs or {}
    return LrSchedule.of_run(str(args.lr_scheduler_type.value), warmup_steps, total_steps, options)
