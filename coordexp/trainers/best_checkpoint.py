"""Which evaluation number picks the best checkpoint of a stage-2 run; checked and announced at its start."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from coordexp.config.checks.problems import closest
from coordexp.errors import ConfigError
from coordexp.metrics.catalog import EVAL_PREFIX
from coordexp.metrics.keys_rollout import F1

logger = logging.getLogger(__name__)


def choose_best_by(args: Any, asked_for: str | None, known: Sequence[str]) -> None:
    """Settle `metric_for_best_model` and `greater_is_better` of the training arguments.

    asked_for: as the user wrote it, with or without `eval_`. None takes rollout/f1, where ms-swift's default would be
    the loss, which rollout evaluation does not have.

    Raises:
        ConfigError: evaluation reports no such number; with the list of those it does.
    """
    if asked_for is None:
        args.metric_for_best_model, args.greater_is_better = F1, True
        return
    bare = asked_for.removeprefix(EVAL_PREFIX)
    if bare not in known:
        near = closest(bare, known)
        hint = f" Did you mean {near}?" if near else ""
        raise ConfigError(
            f"metric_for_best_model = {asked_for!r}: the evaluation of this trainer reports no such number.{hint} "
            f"Expected one of {', '.join(sorted(known))} (with or without `{EVAL_PREFIX}`)."
        )
    args.metric_for_best_model = bare


def announce(args: Any) -> None:
    """Say at the start which number picks the best checkpoint, and in which direction."""
    if args.eval_strategy == "no":
        logger.info("eval_strategy is no: there is no evaluation, so no checkpoint is marked as the best.")
        return
    logger.info(
        "The best checkpoint is the one with the %s %s%s. It is saved when it is found and spared by save_total_limit.",
        "greatest" if args.greater_is_better else "smallest", EVAL_PREFIX, args.metric_for_best_model,
    )  # fmt: skip
