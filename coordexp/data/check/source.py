"""Annotations of any format, as the checks and the conversions take them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coordexp.data.check.findings import Finding
from coordexp.eval.coco.annotations import Dataset


@dataclass(frozen=True, eq=False)
class Source:
    """A data set in pixels, and where its pictures are.

    kind: the format ("coco", "yolo", ...).  split: "train", "val" or what the format calls it, "" for none.
    pictures: of each image its file, or None where no folder of pictures is known.
    left_out: what the format holds that is no object with an extent, by what it is.
    faults: entries that could not be read, where the reader was asked to go on after one.
    findings: what the reader itself noticed.
    """

    path: Path
    kind: str
    dataset: Dataset
    pictures: Sequence[Path | None]
    split: str = ""
    left_out: Counter[str] = field(default_factory=Counter)
    faults: Sequence[str] = ()
    findings: Sequence[Finding] = ()

    @property
    def name(self) -> str:
        """As tables and messages call it."""
        return f"{self.path} ({self.split})" if self.split else str(self.path)

    def image_name(self, row: int) -> str:
        """How messages call an image."""
        return self.dataset.file_names[row] or f"id {self.dataset.image_ids[row]}"
