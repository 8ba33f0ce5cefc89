"""The best checkpoint of a run: which evaluation number picks it, and the link `best` that leads to it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coordexp.errors import ConfigError
from coordexp.files import atomic_link
from coordexp.metrics.best import BestMetric, choose_best_metric, why_not_best
from coordexp.trainers.runtime import RunSettings

logger = logging.getLogger(__name__)

BEST_LINK = "best"
"""In the run folder, a link to the checkpoint of the best evaluation so far."""


class BestCheckpoint:
    """Settles `metric_for_best_model` and `greater_is_better` of the training arguments, and judges evaluations.

    Raises:
        ConfigError: a metric that evaluation does not report, that has no direction, or a contradicting direction.
    """

    def __init__(self, args: Any, settings: RunSettings) -> None:
        asked_for = settings.swift.get("metric_for_best_model")
        greater = settings.swift.get("greater_is_better")
        try:
            self.metric: BestMetric = choose_best_metric(
                asked_for, greater, settings.variant, settings.sections
            )
        except ValueError as error:
            raise ConfigError(f"metric_for_best_model = {asked_for!r}: {error}") from None
        args.metric_for_best_model = self.metric.key
        args.greater_is_better = self.metric.greater_is_better
        rollout_eval = settings.sections.custom.rollout_eval
        self._has_evaluation = args.eval_strategy != "no" or (
            rollout_eval.enabled and rollout_eval.every_steps is not None
        )
        self._is_saved = self._has_evaluation and args.save_strategy != "no"
        self._said: set[str] = set()

    def announce(self) -> None:
        """Say at the start which number picks the best checkpoint, and in which direction."""
        if not self._has_evaluation:
            logger.info(
                "eval_strategy is no: there is no evaluation, so no checkpoint is marked as the best."
            )
            return
        kept = "It is saved when it is found and spared by save_total_limit; the link `best` leads to it."
        logger.info(
            "The best checkpoint is the one with the %s %s. %s",
            "greatest" if self.metric.greater_is_better else "smallest",
            self.metric.logged_as,
            kept if self._is_saved else "save_strategy is no: it is not saved.",
        )

    def derived(self) -> dict[str, Any]:
        """What resolved_config.json says of it; nothing where no checkpoint can become the best."""
        if not self._is_saved:
            return {}
        return {
            "metric_for_best_model": self.metric.key,
            "greater_is_better": self.metric.greater_is_better,
        }

    def may_be_best(self, evaluation: Mapping[str, float], *, is_too_early: bool = False) -> bool:
        """Whether the numbers of an evaluation count; says each reason why not once.

        is_too_early: before `training.save_delay_steps`, where nothing is saved.
        """
        reason = (
            "it comes before training.save_delay_steps"
            if is_too_early
            else why_not_best(self.metric, evaluation)
        )
        if reason is not None and reason not in self._said:
            self._said.add(reason)
            logger.warning(
                "This evaluation picks no best checkpoint: %s. (Said once for this reason.)", reason
            )
        return reason is None


def link_best(run_dir: Path, best_step: int | None) -> None:
    """Point `best` in the run folder at the checkpoint of `best_step`, if that checkpoint is there."""
    name = f"checkpoint-{best_step}"
    link = run_dir / BEST_LINK
    if best_step is None or not (run_dir / name).is_dir() or _target(link) == name:
        return
    try:
        atomic_link(link, name)
    except OSError as error:
        logger.warning("%s could not be pointed at %s: %s.", link, name, error.strerror)


def _target(link: Path) -> str | None:
    return os.readlink(link) if link.is_symlink() else None
