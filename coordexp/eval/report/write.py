"""One self-contained HTML file about one evaluated run, or about several side by side, and the same as numbers.

    write_report([Path("runs/demo/eval_mix")], Path("report.html"), json_path=Path("report.json"))

Pictures are embedded, styles and scripts are inline and the page forbids itself every request, so the file opens
from disk, can be sent and stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from coordexp.errors import ConfigError
from coordexp.eval.coco.evaluate import DEFAULT_ENGINE
from coordexp.eval.errors.label_errors import write_label_errors
from coordexp.eval.report.data import load_runs
from coordexp.eval.report.error_sections import ReportErrors, RunErrors
from coordexp.eval.report.figures import report_figures, run_colors
from coordexp.eval.report.gallery import report_gallery, role_colors
from coordexp.eval.report.headline import HEROES, MEASURES, headline_cells, headline_json, hero_card
from coordexp.eval.report.intervals import Intervals, bootstrap
from coordexp.eval.report.numbers import RunNumbers, compute_numbers
from coordexp.eval.report.page import write_page
from coordexp.eval.report.sweep import sweep_section
from coordexp.eval.report.tables import (
    MAX_UNKNOWN_CLASSES,
    class_table,
    drop_table,
    facts,
    size_table,
    unknown_classes,
)
from coordexp.files import write_json

LABEL_ERRORS = "label_errors.jsonl"
"""After the name of the page, so that two pages of one folder keep theirs: `report.label_errors.jsonl`."""


@dataclass(frozen=True)
class ReportOptions:
    """num_worst, num_best: images that the gallery shows in full size.  num_thumbnails: others, as thumbnails.

    num_resamples: of the bootstrap, 0 for no intervals.  min_score: from which on predictions are looked at in the
    confusion matrix and as label errors; None takes the score of each run's highest F1.
    """

    num_worst: int = 24
    num_best: int = 12
    num_resamples: int = 1000
    seed: int = 0
    engine: str = DEFAULT_ENGINE
    num_thumbnails: int = 5000
    min_score: float | None = None


class WrittenReport(NamedTuple):
    """What `write_report` made. num_missing: pictures of the gallery that could not be read."""

    path: Path
    num_images: int
    num_pictures: int
    num_missing: int
    label_errors: Path
    num_label_errors: int


@dataclass(frozen=True, eq=False)
class Compared:
    """The numbers of one run or several, the first of which the others are compared with."""

    runs: Sequence[RunNumbers]
    intervals: Intervals
    options: ReportOptions

    @property
    def title(self) -> str:
        """Names of the runs."""
        return _title(self.runs)

    @property
    def summary(self) -> str:
        """What was evaluated, in a sentence or two."""
        return _summary(self.runs)

    @property
    def method(self) -> str:
        """How the intervals were made."""
        return _method(self.runs, self.intervals, self.options)

    def as_json(self) -> dict[str, Any]:
        """Headline numbers with intervals and paired differences."""
        return {
            "title": self.title,
            "summary": self.summary,
            "method": self.method,
            "num_images": len(self.runs[0].images),
            "num_resamples": self.options.num_resamples,
            "num_ap_resamples": self.intervals.num_ap_resamples,
            "seed": self.options.seed,
            "runs": [
                {"name": numbers.run.name, "folder": str(numbers.run.directory), "headline": headline}
                for numbers, headline in zip(self.runs, headline_json(self.runs, self.intervals), strict=True)
            ],
        }


def compare_runs(
    directories: Sequence[Path], *, image_root: Path | None = None, options: ReportOptions | None = None
) -> Compared:
    """Evaluate the runs and resample their images.

    Raises RecordError when a folder is no evaluated run, or when the runs are not of the same images and objects.
    """
    options = options or ReportOptions()
    if not directories:
        raise ConfigError("a report needs at least one run folder.")
    runs = [compute_numbers(run, engine=options.engine) for run in load_runs(directories, image_root)]
    return Compared(runs, bootstrap(runs, options.num_resamples, options.seed), options)


def write_report(
    directories: Sequence[Path],
    output: Path,
    *,
    image_root: Path | None = None,
    options: ReportOptions | None = None,
    json_path: Path | None = None,
) -> WrittenReport:
    """Evaluate the runs and write the page, probable label errors beside it, and every number of it as JSON.

    Raises as `compare_runs`.
    """
    compared = compare_runs(directories, image_root=image_root, options=options)
    runs, intervals, options = compared.runs, compared.intervals, compared.options
    errors = ReportErrors([RunErrors.of(numbers, options.min_score) for numbers in runs])
    findings_path = output.with_suffix(f".{LABEL_ERRORS}")
    error_values = {
        "tide": errors.tide_table(),
        "confusion": errors.confusion_tables(),
        "num_repeats": errors.num_repeats(),
        "repeats": errors.repeat_table(),
        "findings": errors.finding_cards(),
        "num_findings": len(errors.findings),
        "file": findings_path.name,
    }
    gallery = report_gallery(
        runs,
        num_worst=options.num_worst,
        num_best=options.num_best,
        num_thumbnails=options.num_thumbnails,
        groups=errors.groups(),
        links=errors.links,
    )
    write_label_errors(findings_path, errors.findings, runs[-1].images, runs[-1].run.image_root)
    if json_path is not None:
        write_json(json_path, report_json(compared, errors))
    write_page(
        output,
        "report.html.jinja",
        title=compared.title,
        summary=compared.summary,
        runs=[
            {"name": numbers.run.name, "color": color}
            for numbers, color in zip(runs, run_colors(len(runs)), strict=True)
        ],
        heroes=[hero_card(measure, runs, intervals) for measure in MEASURES if measure.key in HEROES],
        table=[(measure, headline_cells(measure, runs, intervals)) for measure in MEASURES],
        method=compared.method,
        best_confidence=[_best_confidence(numbers) for numbers in runs],
        figures=report_figures(runs),
        sweep=sweep_section(directories, image_root),
        errors=error_values,
        tag_of={words: tag for tag, words in enumerate(gallery.tags)},
        min_score_is_best=options.min_score is None,
        sizes=size_table(runs),
        classes=class_table(runs),
        num_unlisted=max(0, len(unknown_classes(runs)) - MAX_UNKNOWN_CLASSES),
        drops=drop_table(runs),
        gallery=gallery,
        roles=role_colors(),
        image_root=str(runs[-1].run.image_root),
        facts=[(numbers.run.name, facts(numbers)) for numbers in runs],
    )
    return WrittenReport(
        output,
        len(runs[0].images),
        len(gallery.cards),
        gallery.num_missing,
        findings_path,
        len(errors.findings),
    )


def report_json(compared: Compared, errors: ReportErrors) -> dict[str, Any]:
    """Every number of the page. Rows of images (`image`) count from 0 in the order of `images`."""
    content = compared.as_json()
    runs = compared.runs
    sizes, drops, classes = size_table(runs), drop_table(runs), class_table(runs, most_unknown=None)
    for index, (of_run, numbers) in enumerate(zip(content["runs"], runs, strict=True)):
        curve = numbers.confidence
        of_run |= {
            "best_confidence": _best_confidence(numbers),
            "sizes": [row for row in sizes if row["run"] == numbers.run.name],
            "classes": [
                {"name": row["name"], "num_gt": row["num_gt"], **row["runs"][index]} for row in classes
            ],
            "drops": {reason: counts[index] for reason, counts in drops},
            "facts": facts(numbers),
            **{key: numbers.evaluation.metrics[key] for key in ("f1_by_iou", "calibration", "pr_curves")},
            "f1_over_confidence": {name: values.tolist() for name, values in curve._asdict().items()},
            **errors.runs[index].as_json(),
        }
    images = [image.file_name or image.image_id for image in runs[-1].images]
    return content | {"images": images, "label_errors": errors.findings_json()}


def _title(runs: Sequence[RunNumbers]) -> str:
    return " · ".join(numbers.run.name for numbers in runs)


def _summary(runs: Sequence[RunNumbers]) -> str:
    metrics = runs[0].evaluation.metrics
    num_classes = len({desc for image in runs[0].images for desc in image.gt.descs})
    text = f"{metrics['num_images']} images, {metrics['num_gt']} annotated objects of {num_classes} descriptions."
    if runs[0].evaluation.is_lvis:
        text += " Average precision is by the rules of LVIS."
    if len(runs) > 1:
        text += f" {len(runs)} runs on the same images; changes are against {runs[0].run.name}."
    return text


def _method(runs: Sequence[RunNumbers], intervals: Intervals, options: ReportOptions) -> str:
    if not options.num_resamples:
        return "No bootstrap intervals were asked for."
    text = (
        f"Ranges hold 95 % of {options.num_resamples} bootstrap resamples of the {len(runs[0].images)} images "
        f"(seed {options.seed}, percentiles)"
    )
    if len(runs) > 1:
        text += "; runs share the resamples, so changes are paired, and the range of a coloured change leaves zero out"
    num_ap = intervals.num_ap_resamples
    if not num_ap:
        return text + "; not for AP, which has too many detections to resample."
    fewer = f", AP from {num_ap} of them" if num_ap < options.num_resamples else ""
    return f"{text}{fewer}. Where classes have few images, AP of a resample runs high, and its range with it."


def _best_confidence(numbers: RunNumbers) -> dict[str, str] | None:
    if numbers.confidence.best is None:
        return None
    confidence, f1 = numbers.confidence.best
    return {"name": numbers.run.name, "f1": f"{f1:.3f}", "confidence": f"{confidence:.3f}"}
