"""Tells the signs of life of a rank where training stands."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from coordexp.telemetry.life.keeper import RankLife

TRAINING, BETWEEN = "training", "between steps"
"""What a rank does: from asking for data to the optimizer's update; logging, evaluating, saving."""


class LifeOfSteps(TrainerCallback):
    """Steps as they end."""

    def __init__(self, life: RankLife) -> None:
        self._life = life

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._life.at(int(state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._life.at(int(state.global_step))
        self._life.does(BETWEEN)
