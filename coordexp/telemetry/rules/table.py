"""Every built-in rule, and the rules that a run is judged by. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from coordexp.config.schema.telemetry import Telemetry
from coordexp.telemetry.rules.of_answers import OF_EVALUATIONS, OF_ROLLOUTS
from coordexp.telemetry.rules.of_training import EVERY_RUN, OF_STAGE1
from coordexp.telemetry.rules.rule import WatchRule, rule_of

SECTIONS: Mapping[str, tuple[WatchRule, ...]] = {
    "Every run": EVERY_RUN,
    "Text and coordinates": OF_STAGE1,
    "What the model writes": OF_ROLLOUTS,
    "Evaluations": OF_EVALUATIONS,
}
"""Title -> rules, in the order of the reference page."""
RULES: tuple[WatchRule, ...] = tuple(rule for rules in SECTIONS.values() for rule in rules)
"""Every built-in rule; names are unique."""


def rules_of(settings: Telemetry, variant: str) -> tuple[WatchRule, ...]:
    """What runs of a trainer variant are judged by: the built-in rules with those of the run file laid over them.

    Raises ValueError for a condition that cannot be read.
    """
    own = {rule.name: rule_of(rule) for rule in settings.rules}
    chosen = {rule.name: rule for rule in RULES if rule.is_about(variant)} | own
    return tuple(rule for name, rule in chosen.items() if name not in settings.silenced)
