"""What is wrong or suspicious about the pictures of a data set, from the reports of looking at them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from coordexp.data.check.findings import Finding, Level, found
from coordexp.data.check.pictures import PictureReport
from coordexp.data.check.source import Source
from coordexp.eval.coco.annotations import Dataset
from coordexp.files import is_file
from coordexp.pictures import MAX_PIXELS, check_picture, scaling

Reports = Mapping[Path, PictureReport]

_SIDEWAYS = (5, 6, 7, 8)
_HOW_TO_TURN = "Annotate the picture as viewers show it, or save it upright (without the EXIF tag) first"


def picture_faults(source: Source, reports: Reports) -> dict[int, str]:
    """Rows of images whose picture cannot be used, and why, in one sentence each. Missing files are not among them."""
    faults = {}
    for row, path in enumerate(source.pictures):
        report = reports.get(path) if path is not None else None
        if report is not None:
            fault = report.fault or _size_fault(source, row, report) or _limit_fault(source, row, report)
            if fault is not None:
                faults[row] = fault.rstrip(".")
    return faults


def picture_findings(source: Source, reports: Reports) -> list[Finding]:
    """Everything but missing files."""
    faults = picture_faults(source, reports)
    fault_rows = list(faults)
    findings = [
        found(
            Level.ERROR, "pictures_unusable", "{count} [picture|pictures] cannot be used", fault_rows,
            faults.__getitem__, fault_rows,
        ),
        *_kinds(source, reports),
        *_same_pictures(source, reports),
    ]  # fmt: skip
    return [finding for finding in findings if finding is not None]


def missing_findings(source: Source) -> list[Finding]:
    """Files that are named and not there, and whether any pictures are known at all."""
    if source.pictures and not any(source.pictures):
        message = "no picture was looked at: give the folder that holds them (--image-root)"
        return [Finding(Level.WARNING, "pictures_unknown", message, len(source.pictures))]
    rows = [row for row, path in enumerate(source.pictures) if path is not None and not is_file(path)]
    finding = found(
        Level.ERROR,
        "pictures_missing",
        "{count} picture [file is|files are] missing",
        rows,
        source.image_name,
    )
    return [finding] if finding is not None else []


def leakage_findings(sources: Sequence[Source], reports: Reports) -> list[Finding]:
    """Pictures (by their pixels) that several of the sources hold: training on what is evaluated."""
    holders = [
        {
            report.fingerprint: row
            for row, path in enumerate(source.pictures)
            if path is not None and (report := reports.get(path)) is not None and report.fingerprint
        }
        for source in sources
    ]
    findings = []
    for a, first in enumerate(sources):
        for b in range(a + 1, len(sources)):
            shared = [key for key in holders[a] if key in holders[b]]
            rows_a, rows_b = [holders[a][key] for key in shared], [holders[b][key] for key in shared]

            def name(index: int, rows_a: list[int] = rows_a, rows_b: list[int] = rows_b, b: int = b) -> str:
                return f"{first.image_name(rows_a[index])} = {sources[b].image_name(rows_b[index])}"  # noqa: B023

            finding = found(
                Level.WARNING, "leakage",
                f"{{count}} [picture|pictures] of {first.name} [is|are] in {sources[b].name} too (the same pixels): "
                "what is measured there has been trained on", range(len(shared)), name,
            )  # fmt: skip
            if finding is not None:
                findings.append(finding)
    return findings


def _size_fault(source: Source, row: int, report: PictureReport) -> str | None:
    """Is the picture of the size that it was annotated at?"""
    width, height = source.dataset.sizes_N2[row].tolist()
    facts = report.facts
    if facts is None or not width or (width, height) == (facts.width, facts.height):
        return None
    text = f"image {source.pictures[row]} is {facts.width} x {facts.height} pixels"
    if facts.exif_orientation in _SIDEWAYS and (width, height) == (facts.height, facts.width):
        return (
            f"{text} upright, by its EXIF orientation ({facts.exif_orientation}), but the annotations are for the "
            f"{width} x {height} that are stored. {_HOW_TO_TURN}"
        )
    if (width, height) == (facts.height, facts.width):
        return f"{text}, but the annotations are for {width} x {height}. Are width and height swapped there?"
    return f"{text}, but the annotations are for {width} x {height}. Use the files that were annotated"


def _limit_fault(source: Source, row: int, report: PictureReport) -> str | None:
    if report.facts is None:
        return None
    fault = check_picture(report.facts.width, report.facts.height)
    return f"image {source.pictures[row]} {fault}" if fault is not None else None


def _kinds(source: Source, reports: Reports) -> list[Finding | None]:
    """Pictures that are read, and not simply as they are stored."""
    turned, deep, transparent, large = [], [], [], []
    for row, path in enumerate(source.pictures):
        report = reports.get(path) if path is not None else None
        if report is None or report.facts is None or report.fault is not None:
            continue
        facts = report.facts
        turned += [row] * (facts.exif_orientation != 1)
        deep += [row] * (facts.bits == 16)
        transparent += [row] * facts.has_alpha
        large += [row] * (scaling(facts.width, facts.height) < 1)
    name = source.image_name
    return [
        found(
            Level.WARNING, "exif_orientation",
            "{count} [picture is|pictures are] stored turned or mirrored (EXIF orientation) and read upright, as "
            "viewers show [it|them]: look at the drawn samples whether the boxes were made that way",
            turned, name, turned,
        ),
        found(
            Level.WARNING, "bits_16",
            "{count} [picture has|pictures have] 16 bits a channel, scaled to 8 (the high byte)",
            deep, name, deep,
        ),
        found(
            Level.WARNING, "alpha",
            "{count} [picture has|pictures have] transparency, which is laid on white", transparent,
            name, transparent,
        ),
        found(
            Level.NOTE, "scaled_down",
            f"{{count}} [picture has|pictures have] more than {MAX_PIXELS / 1e6:.1f} million pixels: Qwen3-VL's "
            "processor scales [it|them] down",
            large, name,
        ),
    ]  # fmt: skip


def _same_pictures(source: Source, reports: Reports) -> list[Finding | None]:
    """Images that are one picture, by file or by pixels, told apart by whether their objects are the same."""
    groups: dict[object, list[int]] = defaultdict(list)
    for row, path in enumerate(source.pictures):
        report = reports.get(path) if path is not None else None
        key: object = report.fingerprint if report is not None and report.fingerprint else path
        if key is None:
            key = source.dataset.file_names[row] or row
        groups[key].append(row)
    repeated = [rows for rows in groups.values() if len(rows) > 1]
    if not repeated:
        return []
    labels = _labels(source.dataset, [row for rows in repeated for row in rows])
    other = [rows for rows in repeated if len({labels[row] for row in rows}) > 1]
    same = [rows for rows in repeated if len({labels[row] for row in rows}) == 1]

    def finding(kind: str, groups: list[list[int]], message: str) -> Finding | None:
        def name(index: int) -> str:
            return " = ".join(_entry(source, row) for row in groups[index][:3])

        return found(
            Level.WARNING, kind, message, range(len(groups)), name, [row for rows in groups for row in rows]
        )

    return [
        finding(
            "same_picture_other_labels",
            other,
            "{count} [picture stands|pictures stand] there twice or more often, with other objects",
        ),
        finding(
            "same_picture",
            same,
            "{count} [picture stands|pictures stand] there twice or more often, with the same objects",
        ),
    ]


def _entry(source: Source, row: int) -> str:
    name = source.dataset.file_names[row]
    return f"{name} (id {source.dataset.image_ids[row]})" if name else f"id {source.dataset.image_ids[row]}"


def _labels(dataset: Dataset, rows: Sequence[int]) -> dict[int, frozenset[tuple[int, ...]]]:
    """The objects of some images as sets of (category, box in whole pixels)."""
    wanted = np.zeros(len(dataset.image_ids), dtype=bool)
    wanted[list(rows)] = True
    objects: dict[int, list[tuple[int, ...]]] = {row: [] for row in rows}
    for m in np.flatnonzero(wanted[dataset.image_M]).tolist():
        box = np.rint(dataset.boxes_xywh_M4[m]).astype(int).tolist()
        objects[int(dataset.image_M[m])].append((int(dataset.category_M[m]), *box))
    return {row: frozenset(found_objects) for row, found_objects in objects.items()}
