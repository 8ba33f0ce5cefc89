"""The curves and bars of a report, as SVG. Each run keeps its colour (Okabe-Ito palette) through all figures."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from coordexp.eval.calibration import THRESHOLDS
from coordexp.eval.gallery.thumbnails import data_uri
from coordexp.eval.report.numbers import RunNumbers, drop_reasons

RUN_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TRUTH_COLOR = "#8a929a"
_MAX_POINTS = 400  # of a drawn curve; more would only make the file larger
_MAX_BINS = 30


class ReportFigure(NamedTuple):
    """A picture as a data URI, its heading and one sentence on how to read it."""

    title: str
    caption: str
    source: str


def run_colors(num_runs: int) -> list[str]:
    """One colour per run; they repeat after seven."""
    return [RUN_COLORS[index % len(RUN_COLORS)] for index in range(num_runs)]


def report_figures(runs: Sequence[RunNumbers]) -> list[ReportFigure]:
    """All figures that the runs hold data for."""
    figures = [
        _precision_recall(runs),
        _f1_over_confidence(runs),
        _f1_over_iou(runs),
        *_reliabilities(runs),
        _objects_per_image(runs),
    ]
    if any(map(_answer_tokens, runs)):
        figures.append(_answer_lengths(runs))
    if any(map(drop_reasons, runs)):
        figures.append(_drop_reasons(runs))
    return figures


def _precision_recall(runs: Sequence[RunNumbers]) -> ReportFigure:
    styles = ((0.5, "-"), (0.75, "--"), (None, ":")) if len(runs) == 1 else ((0.5, "-"), (None, ":"))

    def draw(axes: Axes) -> None:
        for numbers, color in _with_colors(runs):
            for iou, style in styles:
                precision = numbers.evaluation.coco.pr_curve(iou)
                if not precision:
                    continue
                label: str | None = "IoU 0.5:0.95" if iou is None else f"IoU {iou}"
                if len(runs) > 1:
                    label = numbers.run.name if iou == 0.5 else None
                axes.plot(numbers.evaluation.coco.recall_points, precision, style, color=color, label=label)
        _unit_square(axes, "recall", "precision")

    meaning = " Solid: IoU 0.5, dotted: the mean of 0.5:0.95." if len(runs) > 1 else ""
    return draw_figure(
        "Precision over recall",
        f"Mean over classes, ranked by score; the area under a curve is its AP.{meaning}",
        draw,
    )


def _f1_over_confidence(runs: Sequence[RunNumbers]) -> ReportFigure:
    alone = len(runs) == 1

    def draw(axes: Axes) -> None:
        for numbers, color in _with_colors(runs):
            curve = numbers.confidence
            keep = _thinned(len(curve.confidence))
            if alone:
                axes.plot(
                    curve.confidence[keep],
                    curve.precision[keep],
                    color=RUN_COLORS[2],
                    lw=1.1,
                    label="precision",
                )
                axes.plot(
                    curve.confidence[keep], curve.recall[keep], color=RUN_COLORS[4], lw=1.1, label="recall"
                )
            axes.plot(
                curve.confidence[keep], curve.f1[keep], color=color, label="F1" if alone else numbers.run.name
            )
            if curve.best is not None:
                axes.plot(*curve.best, "o", color=color, markersize=5)
        _unit_square(axes, "least confidence kept", "at IoU 0.5" if alone else "F1 at IoU 0.5")

    return draw_figure(
        "F1 over confidence",
        "What leaving out unsure predictions would give; the dot is the highest F1.",
        draw,
    )


def _f1_over_iou(runs: Sequence[RunNumbers]) -> ReportFigure:
    def draw(axes: Axes) -> None:
        for numbers, color in _with_colors(runs):
            thresholds = [summary.threshold for summary in numbers.evaluation.f1.by_threshold]
            f1 = [summary.micro.f1 for summary in numbers.evaluation.f1.by_threshold]
            boxes = [summary.micro.f1 for summary in numbers.evaluation.box_f1.by_threshold]
            axes.plot(
                thresholds,
                f1,
                "-o",
                color=color,
                markersize=3.5,
                label=_label(numbers, runs, "box and description"),
            )
            axes.plot(thresholds, boxes, ":", color=color, label="boxes alone" if len(runs) == 1 else None)
        axes.set(xlabel="IoU that a match needs", ylabel="F1", ylim=(0, 1.02))

    dotted = "" if len(runs) == 1 else " Dotted: boxes alone."
    return draw_figure("F1 over IoU", f"How fast F1 falls as boxes have to fit more tightly.{dotted}", draw)


def _reliabilities(runs: Sequence[RunNumbers]) -> list[ReportFigure]:
    return [
        _reliability(runs, iou)
        for iou in THRESHOLDS
        if any(numbers.evaluation.calibration[iou] is not None for numbers in runs)
    ]


def _reliability(runs: Sequence[RunNumbers], iou: float) -> ReportFigure:
    def draw(axes: Axes) -> None:
        axes.plot((0, 1), (0, 1), color=TRUTH_COLOR, lw=0.8)
        for numbers, color in _with_colors(runs):
            found = numbers.evaluation.calibration[iou]
            if found is None:
                continue
            scored, mapped = (
                ([row.score for row in bins], [row.precision for row in bins])
                for bins in (found.bins, found.isotonic_bins)
            )
            axes.plot(*scored, "-o", color=color, markersize=3.5, label=_label(numbers, runs, "as scored"))
            axes.plot(*mapped, ":", color=color, label="isotonic fit" if len(runs) == 1 else None)
        _unit_square(axes, "score", f"share with IoU {iou} and the right description")

    return draw_figure(
        f"Scores as probabilities, IoU {iou}",
        "On the diagonal a score is the share of predictions that are right. Dotted: mapped by an isotonic fit on the "
        "other half of the images.",
        draw,
    )


def _objects_per_image(runs: Sequence[RunNumbers]) -> ReportFigure:
    def draw(axes: Axes) -> None:
        truth = [int((~image.gt.crowd_N).sum()) for image in runs[0].images]
        predicted = [[len(image.pred) for image in numbers.images] for numbers in runs]
        edges = _edges([truth, *predicted])
        axes.hist(truth, edges, color=TRUTH_COLOR, alpha=0.35, label="annotated")
        for values, (numbers, color) in zip(predicted, _with_colors(runs), strict=True):
            axes.hist(
                values, edges, histtype="step", lw=1.8, color=color, label=_label(numbers, runs, "predicted")
            )
        axes.set(xlabel="objects per image", ylabel="images")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return draw_figure("Objects per image", "Annotated and predicted.", draw)


def _answer_lengths(runs: Sequence[RunNumbers]) -> ReportFigure:
    def draw(axes: Axes) -> None:
        lengths = list(map(_answer_tokens, runs))
        edges = _edges(lengths)
        for values, (numbers, color) in zip(lengths, _with_colors(runs), strict=True):
            axes.hist(values, edges, histtype="step", lw=1.8, color=color, label=_label(numbers, runs, None))
        axes.set(xlabel="tokens per answer", ylabel="images")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return draw_figure(
        "Length of the answers", "A peak at the far right is a cut-off by the token limit.", draw
    )


def _answer_tokens(numbers: RunNumbers) -> list[int]:
    return [trace.num_tokens for trace in numbers.run.traces.values() if trace.num_tokens is not None]


def _drop_reasons(runs: Sequence[RunNumbers]) -> ReportFigure:
    counts = list(map(drop_reasons, runs))
    reasons = sorted(
        {reason for count in counts for reason in count}, key=lambda r: sum(c.get(r, 0) for c in counts)
    )

    def draw(axes: Axes) -> None:
        height = 0.8 / len(runs)
        for index, (count, (numbers, color)) in enumerate(zip(counts, _with_colors(runs), strict=True)):
            offsets = np.arange(len(reasons)) + height * ((len(runs) - 1) / 2 - index)
            bars = axes.barh(
                offsets,
                [count.get(r, 0) for r in reasons],
                height,
                color=color,
                label=_label(numbers, runs, None),
            )
            axes.bar_label(bars, padding=3, fontsize=8)
        axes.set_yticks(range(len(reasons)), [reason.replace("_", " ") for reason in reasons])
        axes.set(xlabel="times")
        axes.margins(x=0.12)

    return draw_figure(
        "What was dropped",
        "Objects the parser or the scoring left out, and answers that were cut or held no list, by reason.",
        draw,
    )


def draw_figure(title: str, caption: str, draw: Callable[[Axes], None]) -> ReportFigure:
    """Draw on new axes in the report's style; the SVG is the same for the same data."""
    style: Any = {
        "font.size": 9.5,
        "svg.hashsalt": title,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "lines.linewidth": 1.7,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.9, 3.3), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return ReportFigure(title, caption, data_uri(stream.getvalue(), "image/svg+xml"))


def _with_colors(runs: Sequence[RunNumbers]) -> list[tuple[RunNumbers, str]]:
    return list(zip(runs, run_colors(len(runs)), strict=True))


def _label(numbers: RunNumbers, runs: Sequence[RunNumbers], alone: str | None) -> str | None:
    """The run's name, or what the curve shows where there is only one run."""
    return alone if len(runs) == 1 else numbers.run.name


def _unit_square(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel, xlim=(-0.01, 1.01), ylim=(-0.01, 1.03))


def _thinned(length: int) -> np.ndarray:
    """Indices of at most `_MAX_POINTS` points, first and last among them."""
    return np.unique(np.linspace(0, max(0, length - 1), min(length, _MAX_POINTS)).round().astype(int))


def _edges(groups: Sequence[Sequence[int]]) -> list[float]:
    """Bin edges around whole numbers that hold every value of every group."""
    values = [value for group in groups for value in group]
    low, high = min(values), max(values)
    width = max(1, int(np.ceil((high - low + 1) / _MAX_BINS)))
    return [float(edge) for edge in np.arange(low - 0.5, high + width + 0.5, width)]
