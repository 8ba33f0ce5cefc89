"""A trainer that is complete becomes a dry run: its data sets shrink to the longest samples, and someone watches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coordexp.trainers.dry_run.choose import longest
from coordexp.trainers.dry_run.parts import RunShape, num_evaluations
from coordexp.trainers.dry_run.run import EVAL_IMAGES, DryRun


def start_dry_run(
    trainer: Any, kinds: Mapping[str, int], derived: Mapping[str, Any], *, num_rollout_images: int | None
) -> DryRun:
    """What watches the dry run of one of our trainers; its data sets are replaced.

    kinds: optimizer steps of the whole run, by the name of their kind.  derived: of resolved_config.json.
    num_rollout_images: that an evaluation asks the model about; None for all, which is stage 2.
    """
    args, custom = trainer.args, trainer.settings.sections.custom
    trainer.train_dataset, train = longest(
        trainer.train_dataset, derived["effective_batch_size"] * max(1, len(kinds))
    )
    num_eval = 0
    if trainer.eval_dataset is not None:
        trainer.eval_dataset, evaluation = longest(trainer.eval_dataset, EVAL_IMAGES)
        num_eval = evaluation.num_samples
    own_every = custom.rollout_eval.every_steps if custom.rollout_eval.enabled else None
    total_steps = int(derived.get("total_steps", 0))
    number = num_evaluations(
        str(args.eval_strategy.value), args.eval_steps, total_steps, args.num_train_epochs, own_every
    )
    shape = RunShape(
        trainer.settings.variant, dict(kinds), number, trainer.accelerator.num_processes, train, num_eval
    )
    return DryRun(
        shape,
        evaluates=num_eval > 0 and number > 0,
        num_rollout_images=num_eval if num_rollout_images is None else min(num_rollout_images, num_eval),
        rollouts_only=num_rollout_images is None,
        device=args.device,
        decode=trainer.template.tokenizer.decode,
    )
