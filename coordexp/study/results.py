"""What a study says, from the cells that are done: `study.json`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coordexp.metrics.sinks import installed_versions
from coordexp.study.plan import Cell, Study
from coordexp.study.running import states
from coordexp.study.schema import METRICS
from coordexp.study.statistics import Comparisons, spreads

STUDY_JSON = "study.json"
COSTS = {
    "steps": "steps",
    "train_s": "train s",
    "train_cpu_s": "CPU s",
    "evaluate_wall_s": "evaluate s",
    "tokens_trained": "tokens trained",
    "tokens_generated": "tokens answered",
}
"""Costs of a cell -> head of their column. train_s is of the optimizer steps alone, CPU s of the whole process."""


def results(study: Study) -> dict[str, Any]:
    """The content of `study.json`, of the cells that are done now."""
    found, done = states(study)
    headline = study.file.evaluate.of_headline
    return {
        "name": study.file.name,
        "title": study.file.title or study.file.name,
        "summary": study.file.summary,
        "file": str(study.path),
        "command": shlex.join(["coordexp", "study", str(study.path)]),
        "versions": installed_versions(),
        "seeds": study.file.seeds,
        "baseline": study.file.baseline,
        "headline": study.file.headline,
        "readout": f"{headline.coord}/{headline.score}",
        "bootstrap": study.file.bootstrap.model_dump(),
        "states": {str(cell): state for cell, state in found.items()},
        "tables": _tables(study, done),
        "cells": {str(cell): record for cell, record in done.items()},
    }


def _tables(study: Study, done: Mapping[Cell, Mapping[str, Any]]) -> list[dict[str, Any]]:
    boot = study.file.bootstrap
    comparisons = Comparisons(num_f1=boot.resamples, num_ap=boot.resamples_ap, seed=boot.seed)
    tables = []
    for data, settings in study.file.data.items():
        rows = [
            _row(study, data, recipe, done, comparisons)
            for recipe, settings_of in study.file.recipes.items()
            if settings_of.is_evaluated and any(cell.data == data and cell.recipe == recipe for cell in done)
        ]
        if rows:
            tables.append({"data": data, "label": settings.label or data, "rows": rows})
    return tables


def _row(
    study: Study,
    data: str,
    recipe: str,
    done: Mapping[Cell, Mapping[str, Any]],
    comparisons: Comparisons,
) -> dict[str, Any]:
    """One recipe on one data set."""
    cells = [cell for cell in done if cell.data == data and cell.recipe == recipe]
    records = [done[cell] for cell in cells]
    headline = study.file.evaluate.of_headline
    wanted = f"{headline.coord}/{headline.score}"
    best = _readout(records[0], wanted)
    readouts = {}
    for name in records[0]["readouts"]:
        readouts[name] = {
            **_as_json(spreads([record["readouts"][name] for record in records], list(METRICS))),
        }
        if name != best:
            pairs = [(_folder(study, cell, name), _folder(study, cell, best)) for cell in cells]
            readouts[name]["difference"] = _as_json(comparisons.differences(*_unzipped(pairs)))
    costs = [
        {
            **record["cost"],
            "steps": record["steps"],
            "tokens_generated": record["readouts"][best]["tokens_generated"],
        }
        for record in records
    ]
    return {
        "recipe": recipe,
        "label": study.file.recipes[recipe].label or recipe,
        "seeds": [cell.seed for cell in cells],
        "readout": best,
        "readouts": readouts,
        "cost": _as_json(spreads(costs, list(COSTS))),
        "cost_is_whole": all(cost["is_whole"] for cost in costs),
        "difference": {
            baseline: difference
            for baseline in study.file.baseline
            if (difference := _to_baseline(study, baseline, cells, done, wanted, comparisons))
        },
    }


def _to_baseline(
    study: Study,
    baseline: str,
    cells: Sequence[Cell],
    done: Mapping[Cell, Mapping[str, Any]],
    readout: str,
    comparisons: Comparisons,
) -> dict[str, Any] | None:
    """Differences to a baseline over the seeds that both have; None for itself and where there are none."""
    pairs = [
        (
            _folder(study, cell, _readout(done[cell], readout)),
            _folder(study, other, _readout(done[other], readout)),
        )
        for cell in cells
        if (other := Cell(cell.data, baseline, cell.seed)) in done and other != cell
    ]
    return _as_json(comparisons.differences(*_unzipped(pairs))) if pairs else None


def _readout(record: Mapping[str, Any], wanted: str) -> str:
    """The readout that a cell is compared by: the wanted one, or its first where it has not (digits)."""
    known = record["readouts"]
    return wanted if wanted in known else str(next(iter(known)))


def _folder(study: Study, cell: Cell, readout: str) -> Path:
    return study.folder_of(cell) / "eval" / readout


def _unzipped(pairs: Sequence[tuple[Path, Path]]) -> tuple[list[Path], list[Path]]:
    return [a for a, _ in pairs], [b for _, b in pairs]


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: asdict(value) for name, value in values.items()}
