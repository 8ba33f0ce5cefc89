"""The table of a decode sweep (`coordexp sweep`): its files, and how people see it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coordexp.errors import RecordError
from coordexp.files import read_json, write_text

SWEEP, TABLE = "sweep.json", "sweep.md"
NUMBERS = {
    "AP": ("AP", 3),
    "f1_at_50": ("F1 @.50", 3),
    "precision_at_50": ("precision", 3),
    "recall_at_50": ("recall", 3),
    "duplicate_rate_mean": ("duplicates", 3),
    "drops": ("dropped", 1),
    "truncated": ("cut off", 1),
    "num_pred": ("boxes", 1),
    "boxes_per_second": ("boxes/s", 1),
    "tokens_per_second": ("tokens/s", 1),
}
"""Key of a way in sweep.json -> title, decimals. `drops` counts objects that the parser dropped (and answers that are
no container), `truncated` answers without an end; of K answers they are means."""
_BRIEF = ("AP", "f1_at_50", "duplicate_rate_mean", "drops", "boxes_per_second", "tokens_per_second")
ORACLE = {
    "recall_greedy": "greedy",
    "recall_sampled": "one sampled",
    "recall_best_of_k": "best of K",
    "recall_any_of_k": "any of K",
}
"""Recall in an entry of `oracle` -> title."""
Table = tuple[list[str], list[list[str]]]


def holds_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep."""
    return (folder / SWEEP).is_file()


def read_sweep(folder: Path) -> dict[str, Any]:
    """The content of sweep.json; RecordError where it is none."""
    path = folder / SWEEP
    found = read_json(path)
    if not isinstance(found, dict) or not {"ways", "oracle", "k", "num_images"} <= found.keys():
        raise RecordError(f"{path}: is no sweep.json of `coordexp sweep`.")
    return found


def way_table(sweep: Mapping[str, Any], *, brief: bool = False) -> Table:
    """Head and rows: a row for each way. brief: its name and the numbers that decide."""
    names = _BRIEF if brief else tuple(NUMBERS)
    settings = ["way"] if brief else ["temperature", "penalty", "coordinates", "guided"]
    rows = [
        [
            *([way["name"]] if brief else _settings(way)),
            *(_shown(way[name], NUMBERS[name][1]) for name in names),
        ]
        for way in sweep["ways"]
    ]
    return [*settings, *(NUMBERS[name][0] for name in names)], rows


def _settings(way: Mapping[str, Any]) -> list[str]:
    return [
        f"{way['temperature']:g}",
        f"{way['repetition_penalty']:g}",
        way["coord"],
        "on" if way["guided"] else "off",
    ]


def oracle_table(sweep: Mapping[str, Any]) -> Table:
    """Head and rows: what the sampled answers of each way found; no rows without K."""
    head = ["sampled", *ORACLE.values(), "seen, not said"]
    rows = [
        [one["name"], *(_shown(one[name], 3) for name in ORACLE), str(one["num_unsaid"])]
        for one in sweep["oracle"]
    ]
    return head, rows


def write_table(folder: Path, sweep: Mapping[str, Any]) -> None:
    """sweep.md."""
    text = f"# {sweep['num_images']} images of {Path(sweep['data']).name}\n\n{_markdown(way_table(sweep))}"
    if sweep["oracle"]:
        text += (
            f"\nWith {sweep['k']} sampled answers to each image the row of a sampled way is their mean. Recall at IoU "
            f"0.5:\n\n{_markdown(oracle_table(sweep))}"
        )
    write_text(folder / TABLE, text)


def _markdown(table: Table) -> str:
    head, rows = table
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _shown(value: float | None, decimals: int) -> str:
    if value is None or value < 0:
        return "-"
    return f"{value:.{decimals}f}"
