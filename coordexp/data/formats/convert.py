"""Annotations of any format to the package's JSONL: sorted, in bins, with everything changed or left out counted.

    converted = convert(read_coco(Path("instances_val2017.json"), options), Path("data/val.jsonl"), options)
    converted.counts["objects_written"], converted.findings

A box reaches to the right edge of its last pixel (x + width <= image width), while the last bin stands for the last
pixel centre, width - 1: corners beyond it are clamped and counted. All other corners keep within half a bin.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from coordexp.codec.records import order_objects
from coordexp.codec.schema import KIND_BBOX, KIND_POLY, BoxObject
from coordexp.data.check.boxes import box_findings
from coordexp.data.check.findings import Finding, raise_errors
from coordexp.data.check.names import name_findings
from coordexp.data.check.picture_findings import Reports, picture_faults, picture_findings
from coordexp.data.check.pictures import OnPicture, look_at_all, no_progress
from coordexp.data.check.source import Source
from coordexp.data.formats.options import ImportOptions
from coordexp.errors import RecordError
from coordexp.eval.coco.annotations import BoolArray, Dataset
from coordexp.eval.coco.segmentation import clip_outline, is_run_length, read_outlines
from coordexp.files import is_file, write_jsonl
from coordexp.geometry import MAX_BIN, FloatArray, IntArray, quantize_points, xywh_to_xyxy

COUNTS = (
    "images_read",
    "images_written",
    "images_without_objects",
    "annotations_read",
    "objects_written",
    "crowd_left_out",
    "degenerate_left_out",  # no width or height, or wholly outside the image
    "boxes_widened",  # a side that collapsed to nothing in bins got one bin
    "boxes_clamped",  # reach past the first or last pixel centre
)
"""What is always counted; further counts appear where they are not 0."""


class Converted(NamedTuple):
    """What an import did, and what it found."""

    counts: Counter[str]
    findings: list[Finding]


class Extras(NamedTuple):
    """What a format adds to records.

    descs: the description of every annotation, None for its category's name.  metadata: of an image row.
    counts: to be shown with those of the import.
    """

    descs: Sequence[str] | None = None
    metadata: Callable[[int], dict[str, Any]] = lambda row: {}
    counts: Mapping[str, int] = MappingProxyType({})


def convert(
    source: Source,
    output: Path,
    options: ImportOptions,
    extras: Extras = Extras(),  # noqa: B008  (a tuple)
    *,
    on_picture: OnPicture = no_progress,
) -> Converted:
    """Write the records of a source; completely or not at all.

    on_picture: called with the pictures just looked at, and those in all.
    Raises RecordError for everything that `coordexp data check` calls an error, in the same words: boxes that are not
    what they are read as, pictures that cannot be used, and missing ones, unless the options say otherwise.
    """
    prefix = f"{source.name}: "
    findings = [*box_findings(source.dataset), *name_findings(source.dataset)]
    raise_errors(findings, prefix)
    counts = Counter(dict.fromkeys(COUNTS, 0))
    counts.update(images_read=len(source.pictures), annotations_read=len(source.dataset))
    counts.update({kind: count for kind, count in source.left_out.items() if count})
    left_out, reports = _images_left_out(source, options, counts, prefix, on_picture)
    if reports:
        findings += picture_findings(source, reports)
        if options.bad == "error":
            raise_errors(findings, prefix)
    source = _with_sizes(source, reports, left_out, prefix)
    write_jsonl(output, _Records(source, options, extras, left_out, counts, output.parent))
    counts.update(extras.counts)
    return Converted(counts, findings)


def widened_bins(boxes_xyxy_M4: FloatArray, sizes_M2: IntArray) -> tuple[IntArray, BoolArray]:
    """Bins of pixel boxes, a collapsed side widened to one bin towards where its middle lies; and whether any was.

    boxes_xyxy_M4: pixels of images of `sizes_M2` (width, height).  Returns int64 [M, 4] and bool [M].
    """
    span = np.maximum(1, np.tile(sizes_M2, 2) - 1)
    exact = MAX_BIN * boxes_xyxy_M4 / span
    bins = np.clip(np.rint(exact), 0, MAX_BIN).astype(np.int64)
    low, high = bins[:, :2], bins[:, 2:]
    collapsed = low == high
    middle = (exact[:, :2] + exact[:, 2:]) / 2
    upwards = (low < MAX_BIN) & ((middle >= low) | (low == 0))
    grown = np.concatenate([low - (collapsed & ~upwards), high + (collapsed & upwards)], axis=1)
    return grown, collapsed.any(axis=1)


@dataclass(frozen=True)
class _Converted:
    """An object, the area that decides when an image has too many, and what to count if it is kept."""

    obj: BoxObject
    area: float
    notes: tuple[str, ...]


class _Records:
    """The lines of a source, counted while they are written."""

    def __init__(
        self,
        source: Source,
        options: ImportOptions,
        extras: Extras,
        left_out: set[int],
        counts: Counter[str],
        folder: Path,
    ) -> None:
        self._source, self._options, self._extras = source, options, extras
        self._left_out, self._counts, self._folder = left_out, counts, folder
        dataset = source.dataset
        sizes_M2 = dataset.sizes_N2[dataset.image_M]
        self._boxes = xywh_to_xyxy(dataset.boxes_xywh_M4)
        self._bins, self._widened = widened_bins(self._boxes, sizes_M2)
        beyond = (self._boxes[:, :2] < 0) | (self._boxes[:, 2:] > sizes_M2 - 1)
        self._clamped: BoolArray = np.asarray(beyond.any(axis=1))
        self._has_area: BoolArray = np.asarray(
            (dataset.boxes_xywh_M4[:, 2:] > 0).all(axis=1)
            & (self._boxes[:, :2] < sizes_M2).all(axis=1)
            & (self._boxes[:, 2:] > 0).all(axis=1)
        )
        self._order = np.argsort(dataset.image_M, kind="stable")
        self._starts = np.searchsorted(dataset.image_M[self._order], np.arange(len(dataset.image_ids) + 1))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        counts = self._counts
        for row in range(len(self._source.dataset.image_ids)):
            annotations = self._order[self._starts[row] : self._starts[row + 1]].tolist()
            if row in self._left_out:
                counts["objects_of_left_out_images"] += len(annotations)
                continue
            objects = self._objects(annotations)
            if objects is None or (self._options.drop_empty and not objects):
                counts["images_over_max_objects" if objects is None else "images_empty_left_out"] += 1
                continue
            counts["images_written"] += 1
            counts["images_without_objects"] += not objects
            counts["objects_written"] += len(objects)
            yield self._line(row, objects)
        if not counts["images_written"]:
            left_out = ", ".join(
                f"{name.replace('_', ' ')} {count}" for name, count in counts.items() if count
            )
            raise RecordError(f"{self._source.name}: no image is left to write ({left_out})")

    def _line(self, row: int, objects: Sequence[BoxObject]) -> dict[str, Any]:
        dataset, path = self._source.dataset, self._source.pictures[row]
        name = dataset.file_names[row]
        width, height = dataset.sizes_N2[row].tolist()
        metadata = {"image_id": dataset.image_ids[row], "file_name": name, **self._extras.metadata(row)}
        if self._options.dataset is not None:
            metadata["dataset"] = self._options.dataset
        return {
            "images": [name if path is None else Path(os.path.relpath(path, self._folder)).as_posix()],
            "width": width,
            "height": height,
            "objects": [{"desc": obj.desc, obj.kind: list(obj.bins)} for obj in objects],
            "metadata": metadata,
        }

    def _objects(self, annotations: Sequence[int]) -> list[BoxObject] | None:
        """The objects of one image, sorted; None for an image that has too many."""
        dataset, options, counts = self._source.dataset, self._options, self._counts
        converted = []
        for m in annotations:
            if dataset.crowd_M[m]:
                counts["crowd_left_out"] += 1
            elif not self._has_area[m]:
                counts["degenerate_left_out"] += 1
            else:
                converted.append(self._converted(m))
        if options.max_objects is not None and len(converted) > options.max_objects:
            num_kept = 0 if options.over_max == "drop-image" else options.max_objects
            counts["objects_over_max_left_out"] += len(converted) - num_kept
            if not num_kept:
                return None
            converted = sorted(converted, key=lambda entry: -entry.area)[:num_kept]
        counts.update(note for entry in converted for note in entry.notes)
        return order_objects([entry.obj for entry in converted])

    def _converted(self, m: int) -> _Converted:
        dataset = self._source.dataset
        desc = (
            dataset.category_names[dataset.category_M[m]]
            if self._extras.descs is None
            else self._extras.descs[m]
        )
        area = float(dataset.boxes_xywh_M4[m, 2] * dataset.boxes_xywh_M4[m, 3])
        notes = [
            note
            for note, happened in (("boxes_widened", self._widened[m]), ("boxes_clamped", self._clamped[m]))
            if happened
        ]
        if self._options.polygons:
            bins, outline_notes = _polygon(dataset, m, self._options)
            if bins is not None:
                return _Converted(BoxObject(desc, KIND_POLY, bins), area, outline_notes)
            notes += outline_notes
        box = tuple(self._bins[m].tolist())
        return _Converted(BoxObject(desc, KIND_BBOX, box), area, tuple(notes))


def _polygon(
    dataset: Dataset, m: int, options: ImportOptions
) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """The outline in bins without repeated neighbours, None where the object has to stay a box; and what to count."""
    segmentation = dataset.segmentations[m]
    if segmentation is None:
        return None, ("outlines_missing_as_box",)
    if is_run_length(segmentation):
        return None, ("outlines_of_several_parts_as_box",)
    parts = read_outlines(segmentation, f"{dataset.place(m)}.segmentation")
    if not parts:
        return None, ("outlines_missing_as_box",)
    if len(parts) > 1:
        return None, ("outlines_of_several_parts_as_box",)
    width, height = dataset.sizes_N2[dataset.image_M[m]].tolist()
    inside = clip_outline(parts[0], (0, 0), (width, height))
    points = quantize_points(inside, width, height).tolist() if len(inside) else []
    kept = [point for index, point in enumerate(points) if point != points[index - 1]]
    if len({tuple(point) for point in kept}) < 3:
        return None, ("outlines_degenerate_as_box",)
    if options.max_poly_points is not None and len(kept) > options.max_poly_points:
        return None, ("outlines_over_max_points_as_box",)
    notes = (
        ("polygons_written",) if inside is parts[0] else ("polygons_written", "outlines_cut_at_the_border")
    )
    return tuple(value for point in kept for value in point), notes


def _images_left_out(
    source: Source,
    options: ImportOptions,
    counts: Counter[str],
    prefix: str,
    on_picture: OnPicture,
) -> tuple[set[int], Reports]:
    """Rows of images whose picture is missing or broken and may be left out, and what was seen of all others."""
    missing = {row for row, path in enumerate(source.pictures) if path is not None and not is_file(path)}
    if missing:
        counts["images_missing"] = len(missing)
    if missing and options.missing == "error":
        row = min(missing)
        more = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise RecordError(
            f"{prefix}image {source.image_name(row)} (id {source.dataset.image_ids[row]}) is not in "
            f"{options.image_root or source.path}{more}. Give the folder that holds the images, or leave such images "
            "out (--missing-images skip)."
        )
    present = [path for row, path in enumerate(source.pictures) if path is not None and row not in missing]
    reports = look_at_all(present, on_done=on_picture)
    left_out = missing if options.missing == "skip" else set()
    if options.bad == "skip":
        bad = picture_faults(source, reports)
        counts["images_unusable_left_out"] += len(bad)
        left_out = left_out | set(bad)
    return left_out, reports


def _with_sizes(source: Source, reports: Reports, left_out: set[int], prefix: str) -> Source:
    """Sizes that the annotations do not have, from the pictures. RecordError naming an image without either."""
    dataset = source.dataset
    sizes_N2 = dataset.sizes_N2.copy()
    for row in np.flatnonzero((sizes_N2 == 0).any(axis=1)).tolist():
        path = source.pictures[row]
        report = reports.get(path) if path is not None else None
        if report is not None and report.facts is not None:
            sizes_N2[row] = report.facts.width, report.facts.height
        elif row in left_out:
            sizes_N2[row] = 1
        else:
            raise RecordError(
                f"{prefix}image {source.image_name(row)} (id {dataset.image_ids[row]}) has no width and height, and no "
                "picture to take them from. Give the folder that holds the images (--image-root)."
            )
    return replace(source, dataset=replace(dataset, sizes_N2=sizes_N2))
