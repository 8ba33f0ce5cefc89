"""The checks of a run file that need more than its own settings: what the rest of the package knows."""

from __future__ import annotations

from coordexp.config.run.machine import missing_paths, package_problems
from coordexp.metrics.best import best_metric_problems, steered_metric_problems
from coordexp.telemetry.rules.check import rule_problems

__all__ = ["RUN_CHECKS", "missing_paths"]

RUN_CHECKS = (best_metric_problems, steered_metric_problems, package_problems, rule_problems)
"""Handed to `load_run_config` by every command that reads a run file."""
