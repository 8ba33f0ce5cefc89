"""What is wrong with the `telemetry` section of a run file. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from coordexp.config.checks.problems import Problem, WrittenOf, closest
from coordexp.config.schema.sections import Sections
from coordexp.config.schema.telemetry import UserRule
from coordexp.metrics.catalog import known_instead, lookup
from coordexp.telemetry.rules.condition import Clause, parse_condition
from coordexp.telemetry.rules.table import RULES


def rule_problems(
    variant: str, sections: Sections, swift: Mapping[str, Any], written: WrittenOf
) -> list[Problem]:
    """Rules of a run file that cannot be judged, and names of rules that there are none of."""
    settings = sections.telemetry
    problems = [
        problem
        for index, rule in enumerate(settings.rules)
        for problem in _rule(rule, f"telemetry.rules[{index}]")
    ]
    names = [rule.name for rule in settings.rules]
    for index, name in enumerate(names):
        if name in names[:index]:
            problems.append(
                Problem(f"telemetry.rules[{index}].name", "names a rule that stands above.", value=name)
            )
    known = {rule.name: rule for rule in RULES}
    for field, listed in (("silenced", settings.silenced), ("stop_on", settings.stop_on)):
        for index, name in enumerate(listed):
            path = f"telemetry.{field}[{index}]"
            if name not in known and name not in names:
                choices = sorted({*known, *names})
                near = closest(name, choices)
                hint = f" (did you mean {near}?)" if near else ""
                problems.append(
                    Problem(path, f"there is no such rule{hint}; runbooks/rules.md lists them.", value=name)
                )
            elif name not in names and not known[name].is_about(variant):
                about = ", ".join(known[name].variants)
                problems.append(
                    Problem(
                        path,
                        f"has no effect with trainer variant {variant}: it is about {about}.",
                        value=name,
                    )
                )
    problems += [
        Problem(f"telemetry.stop_on[{index}]", "is silenced, so it cannot end the run.", value=name)
        for index, name in enumerate(settings.stop_on)
        if name in settings.silenced
    ]
    return problems


def _rule(rule: UserRule, path: str) -> Iterator[Problem]:
    if (text := _unknown(rule.key)) is not None:
        yield Problem(f"{path}.key", text, value=rule.key)
        return
    try:
        clauses = parse_condition(rule.condition)
    except ValueError as error:
        yield Problem(f"{path}.condition", f"{error}.", value=rule.condition)
        return
    for clause in clauses:
        if (text := _clause(clause, rule.key)) is not None:
            yield Problem(f"{path}.condition", text, value=rule.condition)


def _clause(clause: Clause, watched: str) -> str | None:
    if clause.key is not None and (text := _unknown(clause.key)) is not None:
        return text
    key = clause.key or watched
    spec = lookup(key)
    if clause.level == "best" and (spec is None or spec.better is None):
        return f"neither more nor less of {key} is better, so there is no best value of it; compare with a number."
    return None


def _unknown(key: str) -> str | None:
    return (
        None if lookup(key) is not None else f"{key} is not in the catalogue of metrics{known_instead(key)}"
    )
