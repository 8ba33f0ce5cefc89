"""The tables of a study as text: the same cells for the page and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from coordexp.study.results import COSTS
from coordexp.study.schema import LOWER_IS_BETTER, METRICS
from coordexp.study.statistics import COMPARED

COLUMNS = (
    "f1_at_50", "f1_50_95", "AP", "AP75", "AP_const", "rollout_f1@0.75", "bin_error", "parse_rate",
    "duplicate_rate_mean", "boxes_per_second",
)  # fmt: skip
READOUT_COLUMNS = ("f1_at_50", "f1_50_95", "AP", "AP75", "AP_const")
DASH = "–"
_DECIMALS = {"bin_error": 1, "boxes_per_second": 1, "tokens_per_object": 1}


class ShownCell(NamedTuple):
    """One cell of a table. small: what stands below the number."""

    text: str
    small: str = ""
    is_best: bool = False


class ShownTable(NamedTuple):
    """A table: heading, a sentence on how to read it, the heads of the columns, and rows of a name and cells."""

    title: str
    caption: str
    heads: list[str]
    rows: list[tuple[str, list[ShownCell]]]


def shown_tables(results: Mapping[str, Any]) -> list[ShownTable]:
    """All tables of a study, data set by data set."""
    made = []
    for table in results["tables"]:
        made.append(_numbers_table(results, table))
        made += [
            _difference_table(table, baseline)
            for baseline in results["baseline"]
            if any(baseline in row["difference"] for row in table["rows"])
        ]
        if any(len(row["readouts"]) > 1 for row in table["rows"]):
            made.append(_readout_table(results, table))
        made.append(_cost_table(table))
    return made


def _numbers_table(results: Mapping[str, Any], table: Mapping[str, Any]) -> ShownTable:
    readout = results["readout"]
    names = list(dict.fromkeys([*results["headline"], *COLUMNS]))
    spreads = [row["readouts"][row["readout"]] for row in table["rows"]]
    best = {name: _best([spread.get(name) for spread in spreads], name) for name in names}
    rows = [
        (
            _with_seeds(row, results["seeds"]) + ("" if row["readout"] == readout else f", {row['readout']}"),
            [_spread(spread.get(name), name, best[name]) for name in names],
        )
        for row, spread in zip(table["rows"], spreads, strict=True)
    ]
    caption = (
        f"Mean over seeds, below it lowest to highest. Coordinates and scores: {readout.replace('/', ', ')}."
    )
    return ShownTable(f"{table['label']}", caption, [METRICS[name] for name in names], rows)


def _difference_table(table: Mapping[str, Any], baseline: str) -> ShownTable:
    rows = [
        (row["label"], [_difference(row["difference"][baseline][name]) for name in COMPARED])
        for row in table["rows"]
        if baseline in row["difference"]
    ]
    label = next(row["label"] for row in table["rows"] if row["recipe"] == baseline)
    caption = (
        "Mean over seeds with its 95 % interval over images (paired by image and seed), below it the difference of "
        "every seed."
    )
    return ShownTable(
        f"{table['label']}: difference to {label}", caption, [METRICS[name] for name in COMPARED], rows
    )


def _readout_table(results: Mapping[str, Any], table: Mapping[str, Any]) -> ShownTable:
    rows = []
    for row in table["rows"]:
        for name, spread in row["readouts"].items():
            cells = [_spread(spread.get(metric), metric, None) for metric in READOUT_COLUMNS]
            difference = spread.get("difference")
            cells += [
                _difference(difference[metric]) if difference else ShownCell(DASH)
                for metric in ("AP", "AP75")
            ]
            rows.append((f"{row['label']}: {name.replace('/', ', ')}", cells))
    heads = [METRICS[name] for name in READOUT_COLUMNS] + ["mAP, difference", "AP75, difference"]
    caption = (
        f"How coordinates and scores are read from the same weights; differences to {results['readout']}."
    )
    return ShownTable(f"{table['label']}: readouts", caption, heads, rows)


def _cost_table(table: Mapping[str, Any]) -> ShownTable:
    rows = []
    for row in table["rows"]:
        cells = [_cost(row["cost"].get(name)) for name in COSTS]
        rows.append((row["label"] + ("" if row["cost_is_whole"] else " *"), cells))
    caption = (
        "Mean over seeds, below it lowest to highest. Train s: of the optimizer steps alone; CPU s: of the whole "
        "training process."
    )
    if not all(row["cost_is_whole"] for row in table["rows"]):
        caption += " *: a process was killed and its CPU seconds are not known."
    return ShownTable(f"{table['label']}: cost", caption, list(COSTS.values()), rows)


def markdown(results: Mapping[str, Any]) -> str:
    """The tables for a README, with the command that makes them."""
    parts = [f"`{results['command']}`, seeds {', '.join(map(str, results['seeds']))}."]
    for table in shown_tables(results):
        lines = [
            f"**{table.title}**",
            "",
            _md_row(["", *table.heads]),
            _md_row(["---", *["---:"] * len(table.heads)]),
        ]
        for name, cells in table.rows:
            lines.append(_md_row([name, *(_md_cell(cell) for cell in cells)]))
        parts.append("\n".join([*lines, "", table.caption]))
    return "\n\n".join(parts) + "\n"


def _md_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _md_cell(cell: ShownCell) -> str:
    text = f"**{cell.text}**" if cell.is_best else cell.text
    return f"{text} ({cell.small})" if cell.small else text


def _best(spreads: Sequence[Mapping[str, float] | None], name: str) -> float | None:
    means = [spread["mean"] for spread in spreads if spread is not None]
    if len(set(means)) < 2:
        return None
    return min(means) if name in LOWER_IS_BETTER else max(means)


def _spread(spread: Mapping[str, Any] | None, name: str, best: float | None) -> ShownCell:
    if spread is None:
        return ShownCell(DASH)
    digits = _DECIMALS.get(name, 3)
    small = (
        ""
        if spread["sd"] is None
        else f"{_number(spread['low'], digits)} to {_number(spread['high'], digits)}"
    )
    return ShownCell(_number(spread["mean"], digits), small, best is not None and spread["mean"] == best)


def _cost(spread: Mapping[str, Any] | None) -> ShownCell:
    if spread is None:
        return ShownCell(DASH)
    is_same = spread["low"] == spread["high"]
    return ShownCell(
        f"{spread['mean']:,.0f}", "" if is_same else f"{spread['low']:,.0f} to {spread['high']:,.0f}"
    )


def _difference(difference: Mapping[str, Any]) -> ShownCell:
    text = f"{difference['mean']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"
    return ShownCell(text, ", ".join(f"{value:+.3f}" for value in difference["by_seed"]))


def _number(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text[1:] if text.startswith("0.") else text


def _with_seeds(row: Mapping[str, Any], seeds: Sequence[int]) -> str:
    """The name of a row; where seeds are missing, how many there are."""
    found = len(row["seeds"])
    return row["label"] if found == len(seeds) else f"{row['label']} ({found} of {len(seeds)} seeds)"
