"""`custom.evaluate_only`: a trainer that is complete evaluates once, as it would have after some step, and ends."""

from __future__ import annotations

from typing import Any

from transformers.trainer_utils import TrainOutput

from coordexp.errors import ConfigError


def evaluate_only(trainer: Any, step: int) -> TrainOutput:
    """Evaluate one of our trainers as after `step` optimizer steps; the record goes where all records go.

    Raises ConfigError where the run has no evaluation.
    """
    if trainer.eval_dataset is None:
        raise ConfigError(
            "custom.evaluate_only: the run has no evaluation data (custom.val_jsonl, val_dataset), or eval_strategy is "
            "no."
        )
    trainer.state.global_step = trainer.state.max_steps = step
    trainer.control = trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    # As in training, so that mixed precision is that of the evaluations within it.
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)
    trainer.evaluate()
    return TrainOutput(step, 0.0, {})
