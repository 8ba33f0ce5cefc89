"""What the lines of a run depend on beside its payloads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from coordexp.config.schema.telemetry import ConsoleLevels
from coordexp.telemetry.console.words import IsHealthy
from coordexp.telemetry.rules.ranges import is_healthy


@dataclass(frozen=True)
class ConsoleView:
    """settings: `telemetry.console`.  max_steps: last optimizer step of the run.

    coord_weights: weights of the coordinate terms of stage 1; None under plain cross-entropy.
    best_metric: key (without `eval_`) by which the best checkpoint is chosen.
    is_healthy: numbers of which it is false get a mark.
    """

    settings: ConsoleLevels = field(default_factory=ConsoleLevels)
    max_steps: int = 0
    coord_weights: Mapping[str, float] | None = None
    best_metric: str | None = None
    is_healthy: IsHealthy = is_healthy

    def is_due(self, level: int, step: int, before: int) -> bool:
        """Whether lines of `level` (1 to 3) belong to the record of `step`, the record before it being of `before`.

        They do where a multiple of the level's `every_steps` lies between the two.
        """
        steps = self.settings.every_steps
        every = {1: steps.level_1, 2: steps.level_2, 3: steps.level_3}[level]
        return level <= self.settings.level and step // every > before // every
