"""`index.html` and `study.md` of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from coordexp.eval.report.figures import ReportFigure, draw_figure, run_colors
from coordexp.eval.report.page import write_page
from coordexp.files import write_json, write_text
from coordexp.metrics.catalog import EVAL_PREFIX
from coordexp.metrics.keys_rollout import F1
from coordexp.metrics.keys_run import LOSS
from coordexp.metrics.keys_stage1 import COORD_DIAG_EXPECTED_BIN_MAE
from coordexp.metrics.keys_stage2 import coord_diagnostic
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
    (
        coord_diagnostic("B", "expected_bin_mae"),
        "Coordinate error on rollouts",
        "Of stage 2, behind the model's own answers, in bins of 1000; of the expectation.",
    ),
    (
        EVAL_PREFIX + F1,
        "F1 of the answers while training",
        "Of evaluations with rollouts, where recipes have them.",
    ),
)
Curve = tuple[list[int], list[float]]


class CurveBand(NamedTuple):
    """Of several seeds: mean, lowest and highest at every step that all of them have."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


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
            band = curve_band([_curve(study.folder_of(cell), key) for cell in done])
            if band.steps:
                lines[recipe] = band

        def draw(axes: Axes, lines: Mapping[str, CurveBand] = lines) -> None:
            for recipe, band in lines.items():
                label = study.file.recipes[recipe].label or recipe
                axes.plot(band.steps, band.mean, color=colors[recipe], label=label)
                axes.fill_between(band.steps, band.low, band.high, color=colors[recipe], alpha=0.15, lw=0)
            axes.set(xlabel="optimizer step", ylim=(0, None))

        if lines:
            figures.append(draw_figure(title, caption, draw))
    return figures


def curve_band(curves_of_seeds: Sequence[Curve]) -> CurveBand:
    """Of the curves of all seeds."""
    of_step = [dict(zip(steps, values, strict=True)) for steps, values in curves_of_seeds]
    shared = sorted(set.intersection(*(set(found) for found in of_step))) if of_step else []
    values = [[found[step] for found in of_step] for step in shared]
    return CurveBand(shared, list(map(fmean, values)), list(map(min, values)), list(map(max, values)))


def _curve(folder: Path, key: str) -> Curve:
    path = folder / METRICS_FILE
    if not path.is_file():
        return [], []
    points = {p["global_step"]: p["metrics"][key] for p in read_payloads(path) if key in p["metrics"]}
    return sorted(points), [float(points[step]) for step in sorted(points)]
