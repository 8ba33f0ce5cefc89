"""Which part of its schedule a learning rate is in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WARMUP, STABLE, DECAY = "warmup", "stable", "decay"
LR_PHASES = (WARMUP, STABLE, DECAY)
"""In the order of their numbers in `lr/phase`."""

_STABLE_FOREVER = ("constant_with_warmup", "reduce_lr_on_plateau", "greedy")
_ENDLESS_DECAY = ("inverse_sqrt",)


@dataclass(frozen=True)
class LrSchedule:
    """Warm-up, then stable, then decay, in optimizer steps.

    decay_from: first step of the decay; None without one.  decay_until: where it has ended; None where it has no end.
    """

    warmup_steps: int = 0
    decay_from: int | None = None
    decay_until: int | None = None

    @classmethod
    def of_run(
        cls, name: str, warmup_steps: int, total_steps: int | None, options: Mapping[str, Any] | None = None
    ) -> LrSchedule:
        """The schedule that transformers makes for `lr_scheduler_type: name`.

        total_steps: of the run; None where it is not known.  options: `lr_scheduler_kwargs`.
        """
        options = options or {}
        if name == "constant":  # it has no warm-up, whatever is asked for
            return cls()
        if name in _STABLE_FOREVER:
            return cls(warmup_steps)
        if name in _ENDLESS_DECAY:
            return cls(warmup_steps, warmup_steps)
        if name != "warmup_stable_decay":
            return cls(warmup_steps, warmup_steps, total_steps)
        decay_steps, stable_steps = options.get("num_decay_steps"), options.get("num_stable_steps")
        if decay_steps is None:
            return cls(warmup_steps)
        if stable_steps is None:
            if total_steps is None:
                return cls(warmup_steps)
            stable_steps = total_steps - warmup_steps - int(decay_steps)
        begin = warmup_steps + int(stable_steps)
        return cls(warmup_steps, begin, begin + int(decay_steps))

    def phase(self, step: int) -> str:
        """Of the learning rate after `step` optimizer steps: `warmup`, `stable` or `decay`."""
        if step < self.warmup_steps:
            return WARMUP
        return STABLE if self.decay_from is None or step < self.decay_from else DECAY

    def derived(self) -> dict[str, int]:
        """What resolved_config.json says of it."""
        found = {
            "warmup_steps": self.warmup_steps,
            "lr_decay_from": self.decay_from,
            "lr_decay_until": self.decay_until,
        }
        return {name: value for name, value in found.items() if value is not None}
