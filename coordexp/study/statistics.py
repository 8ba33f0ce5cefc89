"""Means and spreads over seeds, and intervals of paired differences over images.

Cells that are compared answered the same images. A resample draws images, the same ones for both recipes and all
seeds; its value is the mean over seeds of the difference of two cells of one seed. Seeds are not drawn: three say
little about all seeds, so the differences of single seeds stand beside the interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from coordexp.errors import ContractError
from coordexp.eval.evaluate import COCO_GT, COCO_PREDS, METRICS, PER_IMAGE, from_coco_files
from coordexp.eval.report.bootstrap import (
    CategoryMatches,
    coco_matches,
    image_weights,
    interval,
    resample_indices,
    resampled_ap,
    resampled_f1,
)
from coordexp.files import read_json
from coordexp.geometry import FloatArray, IntArray

F1_NUMBERS, AP_NUMBERS = ("f1_at_50", "f1_50_95"), ("AP", "AP75")
COMPARED = (*F1_NUMBERS, *AP_NUMBERS)
"""Numbers that have intervals."""


@dataclass(frozen=True)
class SeedSpread:
    """Of one number over seeds. sd: None for a single seed."""

    mean: float
    low: float
    high: float
    sd: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> SeedSpread:
        """Of at least one value."""
        return cls(fmean(values), min(values), max(values), stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class PairedDifference:
    """Of two recipes in one number. by_seed: of single seeds; low, high: 95 % interval of their mean over images."""

    mean: float
    low: float
    high: float
    by_seed: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class ImageCounts:
    """What resampling needs of the evaluation of one cell.

    images: their names, in order.  counts_NT3: at IoU 0.50:0.05:0.95, (tp, fp, fn).  categories: COCO matches.
    """

    images: tuple[str, ...]
    counts_NT3: IntArray
    categories: Sequence[CategoryMatches]

    @classmethod
    def of(cls, folder: Path) -> ImageCounts:
        """From the files of an evaluation."""
        thresholds = read_json(folder / METRICS)["settings"]["iou_thresholds"]
        rows = read_json(folder / PER_IMAGE)
        if len(thresholds) != 10:
            raise ContractError(
                f"{folder}: evaluated at {len(thresholds)} thresholds, expected 0.50:0.05:0.95"
            )
        coco = from_coco_files(folder / COCO_GT, folder / COCO_PREDS).coco
        if coco is None:
            raise ContractError(f"{folder}: no COCO files")
        return cls(
            tuple(row["image"] for row in rows),
            np.array([row["counts"] for row in rows], dtype=np.int64),
            coco_matches(coco[1]),
        )


@dataclass(frozen=True, eq=False)
class Resamples:
    """How often each image was drawn: for F1 and, fewer, for average precision. Each [B, N]."""

    f1_BN: IntArray
    ap_BN: IntArray

    @classmethod
    def draw(cls, num_images: int, *, num_f1: int, num_ap: int, seed: int) -> Resamples:
        """The same for the same arguments."""
        drawn_BN = image_weights(resample_indices(num_images, max(num_f1, num_ap), seed))
        return cls(drawn_BN[:num_f1], drawn_BN[:num_ap])

    @classmethod
    def identity(cls, num_images: int) -> Resamples:
        """Every image once: the numbers as they are."""
        ones = np.ones((1, num_images), dtype=np.int64)
        return cls(ones, ones)

    def numbers(self, counts: ImageCounts) -> dict[str, FloatArray]:
        """Every number of `COMPARED` in every resample."""
        f1 = resampled_f1(self.f1_BN, counts.counts_NT3)
        ap = resampled_ap(self.ap_BN, counts.categories)
        return {**{name: f1[name] for name in F1_NUMBERS}, **{name: ap[name] for name in AP_NUMBERS}}


class Comparisons:
    """Paired differences between evaluations of the same images; each is resampled once."""

    def __init__(self, *, num_f1: int, num_ap: int, seed: int) -> None:
        self._settings = {"num_f1": num_f1, "num_ap": num_ap, "seed": seed}
        self._resamples: dict[int, Resamples] = {}
        self._numbers: dict[Path, tuple[tuple[str, ...], dict[str, FloatArray], dict[str, FloatArray]]] = {}

    def differences(self, ours: Sequence[Path], theirs: Sequence[Path]) -> dict[str, PairedDifference]:
        """Of evaluation folders, one per seed, the n-th of both of the same seed.

        Raises ContractError for evaluations of different images.
        """
        pairs = [(self._of(a), self._of(b)) for a, b in zip(ours, theirs, strict=True)]
        if any(a[0] != b[0] for a, b in pairs) or len({a[0] for a, _ in pairs}) > 1:
            raise ContractError(f"{ours[0]} and {theirs[0]} are of different images")
        return {
            name: paired_difference(
                [float(a[1][name][0] - b[1][name][0]) for a, b in pairs],
                np.stack([a[2][name] - b[2][name] for a, b in pairs]),
            )
            for name in COMPARED
        }

    def _of(self, folder: Path) -> tuple[tuple[str, ...], dict[str, FloatArray], dict[str, FloatArray]]:
        if folder not in self._numbers:
            counts = ImageCounts.of(folder)
            size = len(counts.images)
            if size not in self._resamples:
                self._resamples[size] = Resamples.draw(size, **self._settings)
            as_they_are = Resamples.identity(size).numbers(counts)
            self._numbers[folder] = (counts.images, as_they_are, self._resamples[size].numbers(counts))
        return self._numbers[folder]


def paired_difference(by_seed: Sequence[float], resampled_SB: FloatArray) -> PairedDifference:
    """From the differences of single seeds as they are, and in every resample of the images.

    resampled_SB: float64 [seeds, resamples].
    """
    low, high = interval(resampled_SB.mean(axis=0))
    return PairedDifference(fmean(by_seed), low, high, tuple(by_seed))


def spreads(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, SeedSpread]:
    """Of every number that all rows have."""
    values = {name: [row.get(name) for row in rows] for name in names}
    return {
        name: SeedSpread.of([float(value) for value in found if value is not None])
        for name, found in values.items()
        if found and all(value is not None for value in found)
    }
