"""runbooks/rules.md: every built-in rule and every healthy range, printed from the data. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from coordexp.metrics.catalog import lookup
from coordexp.telemetry.rules.ranges import RANGES, healthy_range
from coordexp.telemetry.rules.rule import STAGE1, STAGE2, HealthyRange, WatchRule
from coordexp.telemetry.rules.table import RULES, SECTIONS

_INTRO = """\
# Rules and healthy ranges

Every rule that a run is judged by, while it trains and by `coordexp doctor`. Printed from the data by
`coordexp metrics write-rules`; do not edit. What to do with a finding: [watch_a_run.md](watch_a_run.md).

- A condition is about the number of the row, or about the one whose key stands first. `best`: its best value before, by
  the direction in [metrics.md](metrics.md). `usual`: the median of its last 100 values, once there are 10; those beyond
  the bound are left out. `falls < 1% in 200`: its mean over 100 steps against that over the 100 steps before.
- A record without the number changes nothing. A rule is said at most once per 200 steps.
- `from`: the first step, or share of the run, at which it is judged.

Rules of your own, in a run file (`coordexp config check` reads them; one with a name of this page replaces that rule):

```yaml
telemetry:
  rules:
    - name: boxes_too_far
      key: eval_rollout/matched_maskiou_mean
      condition: "< 0.7 and rollout/recall > 0.3"     # beside a number of an evaluation, others of the same one
      for_records: 2
      meaning: boxes are found but lie badly
      action: raise w1_weight
  silenced: [data_slow]
  stop_on: [nonfinite_loss, boxes_too_far]             # exit code 4
```
"""
MOST_KEYS = 20
"""A row with more shows families of keys."""
_STAGES = {(): "all", STAGE1: "1", STAGE2: "2"}


def render_rules() -> str:
    """The whole page, as Markdown."""
    parts = [_INTRO]
    for title, rules in SECTIONS.items():
        parts.append(
            f"\n## {title}\n\n| rule | number | condition | for | from | stage | meaning | what to do |\n"
        )
        parts.append("|---|---|---|---|---|---|---|---|\n")
        parts += [_row(*_cells(rule)) for rule in rules]
    parts.append(
        "\n## Healthy ranges\n\nNumbers of an evaluation have the range of their number in training.\n\n"
    )
    parts.append("| number | from | to | from step |\n|---|---|---|---|\n")
    parts += [_row(*_range(entry)) for entry in RANGES]
    return "".join(parts)


def watched(key: str) -> list[str]:
    """Lines for `coordexp metrics explain`: the healthy range of a number, and the rules that watch it."""
    lines, entry = [], healthy_range(key)
    if entry is not None:
        low = [] if entry.low is None else [f"at least {entry.low:g}"]
        high = [] if entry.high is None else [f"at most {entry.high:g}"]
        begins = f", from step {entry.from_step}" if entry.from_step else ""
        lines.append(f"  {'healthy':<12} {' and '.join(low + high)}{begins}")
    rules = [f"{rule.name} ({rule.condition})" for rule in RULES if key in rule.keys]
    return [*lines, *([f"  {'rules':<12} {', '.join(rules)}"] if rules else [])]


def _cells(rule: WatchRule) -> tuple[str, ...]:
    begins = f"{rule.from_share:.0%} of the run" if rule.from_share else str(rule.from_step or "")
    keys = ", ".join(f"`{key}`" for key in _named(rule.keys))
    how_long = rule.how_long.removeprefix("for ")
    stage = _STAGES[rule.variants]
    return (f"`{rule.name}`", keys, f"`{rule.condition}`", how_long, begins, stage, rule.meaning, rule.action)


def _named(keys: Sequence[str]) -> Sequence[str]:
    """Keys as a row shows them: many of one family by its pattern."""
    if len(keys) <= MOST_KEYS:
        return keys
    return list(dict.fromkeys(key if (spec := lookup(key)) is None else spec.family for key in keys))


def _range(entry: HealthyRange) -> tuple[str, ...]:
    low, high = ("" if bound is None else f"{bound:g}" for bound in (entry.low, entry.high))
    return f"`{entry.key}`", low, high, str(entry.from_step or "")


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
