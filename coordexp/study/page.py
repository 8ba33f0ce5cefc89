"""`index.html` and `study.md` of a study."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
from coordexp.study.schema import METRICS
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
    return write_page(
        study.results_folder / PAGE,
        "study_page.html.jinja",
        study=found,
        tables=shown_tables(found),
        figures=[
            (table["label"], [*outcomes(study, table, found), *curves(study, table["data"], found)])
            for table in found["tables"]
        ],
        missing={cell: state for cell, state in found["states"].items() if state != "done"},
    )


def outcomes(study: Study, table: Mapping[str, Any], found: Mapping[str, Any]) -> list[ReportFigure]:
    """The first number of the headline: every seed of every recipe, alone and over the seconds of its training."""
    name = study.file.headline[0]
    points = {
        row["label"]: [
            point
            for cell in _cells(table, row)
            if (point := _point(found["cells"][str(cell)], row["readout"], name)) is not None
        ]
        for row in table["rows"]
    }
    colors = [_colors(study)[row["recipe"]] for row in table["rows"]]

    def draw_seeds(axes: Axes) -> None:
        for index, (of_seeds, color) in enumerate(zip(points.values(), colors, strict=True)):
            values = [value for _, value in of_seeds]
            axes.plot(values, [index] * len(values), "o", color=color, alpha=0.55, mec="none")
            if values:
                axes.plot(fmean(values), index, "|", color=color, markersize=18, mew=2.5)
        axes.set_yticks(range(len(points)), list(points))
        axes.set(xlabel=METRICS[name], ylim=(len(points) - 0.5, -0.5))
        axes.set_xlim(0, _room(value for of_seeds in points.values() for _, value in of_seeds))

    def draw_cost(axes: Axes) -> None:
        for (label, of_seeds), color in zip(points.items(), colors, strict=True):
            measured = [(seconds, value) for seconds, value in of_seeds if seconds is not None]
            if measured:
                axes.plot(*zip(*measured, strict=True), "o", color=color, alpha=0.7, mec="none", label=label)
        axes.set(xlabel="seconds of training", ylabel=METRICS[name])
        axes.set_xlim(0, _room(seconds or 0.0 for of_seeds in points.values() for seconds, _ in of_seeds))
        axes.set_ylim(0, _room(value for of_seeds in points.values() for _, value in of_seeds))

    return [
        draw_figure(METRICS[name], "A dot is a seed, a bar their mean.", draw_seeds),
        draw_figure(
            f"{METRICS[name]} over cost", "A dot is a seed; seconds of its optimizer steps.", draw_cost
        ),
    ]


def curves(study: Study, data: str, found: Mapping[str, Any]) -> list[ReportFigure]:
    """Learning curves of the recipes on one data set, mean over seeds."""
    colors = _colors(study)
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


def _room(values: Iterable[float]) -> float:
    """The end of an axis from 0 that leaves room behind the largest value."""
    return 1.08 * max(values, default=0.0) or 1.0


def _colors(study: Study) -> dict[str, str]:
    return dict(zip(study.file.recipes, run_colors(len(study.file.recipes)), strict=True))


def _cells(table: Mapping[str, Any], row: Mapping[str, Any]) -> list[Cell]:
    return [Cell(table["data"], row["recipe"], seed) for seed in row["seeds"]]


def _point(record: Mapping[str, Any], readout: str, name: str) -> tuple[float | None, float] | None:
    """Seconds of training, and a number of the evaluation; None where it could not be measured."""
    value = record["readouts"][readout][name]
    return None if value is None else (record["cost"]["train_s"], float(value))


def _curve(folder: Path, key: str) -> Curve:
    path = folder / METRICS_FILE
    if not path.is_file():
        return [], []
    points = {p["global_step"]: p["metrics"][key] for p in read_payloads(path) if key in p["metrics"]}
    return sorted(points), [float(points[step]) for step in sorted(points)]
