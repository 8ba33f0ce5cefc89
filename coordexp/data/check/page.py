"""The page of a check: one file that asks nothing of a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from coordexp.data.check.findings import Level
from coordexp.data.check.run import CheckReport
from coordexp.data.check.samples import Sample, draw_samples
from coordexp.data.check.tables import QUANTILES, class_rows, overview, picture_sizes, spreads
from coordexp.files import write_text

MAX_CLASSES = 200
"""Rows of the class table; the rarer ones are counted."""


def write_page(
    report: CheckReport,
    output: Path,
    *,
    num_samples: int = 24,
    seed: int = 0,
    augmented: Sequence[Sequence[Sample]] = (),
) -> None:
    """Write the page of a check.

    num_samples: drawn pictures of every source.  augmented: of every source, samples as training changes them.
    """
    overviews = [overview(source) for source in report.sources]
    sections = [
        {
            "name": source.name,
            "kind": source.kind,
            "findings": findings,
            "overview": found,
            "classes": class_rows(source),
            "spreads": spreads(source),
            "sizes": picture_sizes(source),
            "samples": draw_samples(source, findings, num_samples, seed),
            "augmented": changed,
        }
        for source, findings, found, changed in zip(
            report.sources, report.findings, overviews, augmented or [()] * len(overviews), strict=True
        )
    ]
    html = (
        _environment()
        .get_template("check.html.jinja")
        .render(
            title=_title(report),
            sections=sections,
            shared=report.shared,
            totals=[
                ("Images", sum(found.images for found in overviews)),
                ("Objects", sum(found.objects for found in overviews)),
                ("Errors", report.count(Level.ERROR)),
                ("Warnings", report.count(Level.WARNING)),
            ],
            quantiles=QUANTILES,
            max_classes=MAX_CLASSES,
        )
    )
    write_text(output, html)


def _title(report: CheckReport) -> str:
    return " and ".join(dict.fromkeys(source.path.name for source in report.sources))


def _number(value: float) -> str:
    """A number of a table: whole where it is, else with up to two decimals."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.2f}".rstrip("0").rstrip(".")


def _environment() -> Environment:
    environment = Environment(
        loader=ChoiceLoader(
            [
                PackageLoader("coordexp.data.check", "templates"),
                PackageLoader("coordexp.eval.report", "templates"),
            ]
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    return environment
