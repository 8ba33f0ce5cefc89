"""`index.html` and `study.md` of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from coordexp.eval.report.figures import ReportFigure, draw_figure, run_colors
from coordexp.eval.report.page import write_page
from coordexp.files import write_json, write_text
from coordexp.metrics.keys_run import LOSS
from coordexp.metrics.keys_stage1 import COORD_DIAG_EXPECTED_BIN_MAE
from coordexp.metrics.sinks import METRICS_FILE, read_payloads
from coordexp.study.plan import Cell, Study
from coordexp.study.results import STUDY_JSON, results
from coordexp.study.tables import markdown, shown_tables

PAGE, MARKDOWN = "index.html", "study.md"
CURVES = (
    (LOSS, "Loss", "Of each recipe's own objective: the levels of different objectives do not compare."),
    (
        COORD_DIAG_EXPECTED_BIN_MAE,
        "Coordinate error while training",
        "Teacher-forced, in bins of 1000; of the expectation.",
    ),
)
Curve = tuple[list[float], list[float]]


def write_results(study: Study) -> Path:
    """Write `study.json`, `study.md` and the page; returns the page."""
    found = results(study)
    write_json(study.results_folder / STUDY_JSON, found)
    write_text(study.results_folder / MARKDOWN, markdown(found))
    labels = {table["data"]: table["label"] for table in found["tables"]}
    return write_page(
        study.results_folder / PAGE,
        "study_page.html.jinja",
        study=found,
        tables=shown_tables(found),
        figures=[(labels[data], figures) for data in labels if (figures := curves(study, data, found))],
        missing={cell: state for cell, state in found["states"].items() if state != "done"},
    )


def curves(study: Study, data: str, found: Mapping[str, Any]) -> list[ReportFigure]:
    """Learning curves of the recipes on one data set, mean over seeds."""
    colors = dict(zip(study.file.recipes, run_colors(len(study.file.recipes)), strict=True))
    figures = []
    for key, title, caption in CURVES:
        lines = {}
        for recipe in study.file.recipes:
            cells = [Cell(data, recipe, seed) for seed in study.file.seeds]
            done = [cell for cell in cells if str(cell) in found["cells"]]
            line = mean_curve([_curve(study.folder_of(cell), key) for cell in done])
            if line[0]:
                lines[recipe] = line

        def draw(axes: Axes, lines: Mapping[str, Curve] = lines) -> None:
            for recipe, (steps, values) in lines.items():
                label = study.file.recipes[recipe].label or recipe
                axes.plot(steps, values, color=colors[recipe], label=label)
            axes.set(xlabel="optimizer step", ylim=(0, None))

        if lines:
            figures.append(draw_figure(title, caption, draw))
    return figures


def mean_curve(curves_of_seeds: Sequence[Curve]) -> Curve:
    """Mean over the curves at the steps that all of them have."""
    of_step = [dict(zip(steps, values, strict=True)) for steps, values in curves_of_seeds]
    shared = sorted(set.intersection(*(set(found) for found in of_step))) if of_step else []
    return shared, [float(np.mean([found[step] for found in of_step])) for step in shared]


def _curve(folder: Path, key: str) -> Curve:
    path = folder / METRICS_FILE
    if not path.is_file():
        return [], []
    points = {p["global_step"]: p["metrics"][key] for p in read_payloads(path) if key in p["metrics"]}
    return [float(step) for step in sorted(points)], [float(points[step]) for step in sorted(points)]
