"""runbooks/metrics.md and `coordexp metrics explain`, printed from the catalogue. No torch."""

from __future__ import annotations

from dataclasses import replace

from coordexp.errors import ContractError
from coordexp.metrics.catalog import SECTIONS, known_instead, lookup
from coordexp.metrics.spec import KeySection, MetricSpec, Reduce

LARGEST_FAMILY = 24
"""Keys of one meaning that the page lists one by one."""

_INTRO = """\
# Metrics

Every key that a run can log. Printed from the catalogue by `coordexp metrics write-reference`; do not edit.
`coordexp metrics explain KEY` prints one entry.

- Names are those of training. In evaluation every key carries the prefix `eval_` (`eval_coord_diag/loss`).
- A key that is absent did not happen. It is never logged as 0 instead.
- Numbers cover the whole logging window: all micro-steps since the last log, and all ranks.
- `sum`: added up. `mean`: sums over counts; the column says what is counted. `ratio`: summed numerators over
  summed denominators. `max`: the largest value.
- A name with `<...>` stands for a large family; `coordexp metrics explain` knows its members.
- `better`: which way a number should go; a number without a direction cannot be `metric_for_best_model`.
- A run directory holds `metrics.jsonl` (a `run_meta` record, then one payload a line) and `stats.json` (a small
  payload, replaced at every optimizer step). A payload:
  `{"schema_version": 1, "mode": "train", "global_step": 7, "metrics": {...}}`.
"""


def render_reference() -> str:
    """The whole page, as Markdown."""
    parts = [_INTRO]
    for section in SECTIONS:
        parts.append(f"\n## {section.title}\n")
        if section.intro:
            parts.append(f"\n{section.intro}\n")
        parts.append("\n| key | unit | kind | better | reduced by | in the loss | present on | meaning |\n")
        parts.append("|---|---|---|---|---|---|---|---|\n")
        parts += [_row(spec) for spec in _shown(section)]
    return "".join(parts)


def explain(key: str) -> str:
    """One entry in words.

    Raises:
        ContractError: a key that the catalogue does not know, with what replaced it or the nearest one.
    """
    spec = lookup(key)
    if spec is None:
        raise ContractError(f"metric key {key!r} is not in the catalogue{known_instead(key)}")
    rows = {
        "meaning": spec.meaning,
        "unit": spec.unit,
        "kind": spec.kind.value,
        "better": spec.better or "no direction",
        "reduced by": _reduction(spec),
        "in the loss": "yes" if spec.in_loss else "no",
        "present on": spec.when,
        "logged by": spec.source,
    }
    if spec.family != spec.key:
        rows["family"] = spec.family
    return "\n".join([spec.key, *(f"  {name:<12} {text}" for name, text in rows.items())])


def _shown(section: KeySection) -> list[MetricSpec]:
    """What rows are about: a large family whose members mean the same is one row, under its pattern."""
    meanings: dict[str, list[str]] = {}
    for spec in section:
        meanings.setdefault(spec.family, []).append(spec.meaning)
    shown: dict[str, MetricSpec] = {}
    for spec in section:
        members = meanings[spec.family]
        if len(members) <= LARGEST_FAMILY or len(set(members)) > 1:
            shown[spec.key] = spec
        else:
            shown.setdefault(spec.family, replace(spec, key=spec.family))
    return list(shown.values())


def _row(spec: MetricSpec) -> str:
    cells = (
        f"`{spec.key}`",
        spec.unit,
        spec.kind.value,
        spec.better or "",
        _reduction(spec),
        "yes" if spec.in_loss else "no",
        spec.when,
        spec.meaning,
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _reduction(spec: MetricSpec) -> str:
    if spec.source != "coordexp":
        return f"by {spec.source}"
    return (
        f"{spec.reduce.value} over {spec.over}"
        if spec.reduce in (Reduce.MEAN, Reduce.RATIO)
        else spec.reduce.value
    )
