"""The part of a report about errors: their kinds and cost, confusions, repeats, and probable label errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from coordexp.eval.errors.confusion import Cell, Confusion, confusion_matrix
from coordexp.eval.errors.label_errors import LabelError, label_errors
from coordexp.eval.errors.tide import ErrorKind, TideErrors, tide_errors
from coordexp.eval.gallery.thumbnails import Crop, cropped
from coordexp.eval.predictions.image_result import repeats
from coordexp.eval.report.numbers import RunNumbers

MAX_CONFUSED = 30
"""Rows and columns of a confusion matrix, those of most errors; the others are taken together."""
MAX_REPEATS, MAX_FINDINGS = 30, 60
"""Listed on the page."""
OTHER, NOTHING = "(others)", "nothing"


class Repeated(NamedTuple):
    """Predictions of one description in one image that repeat an earlier one. image: its row.  largest: IoU."""

    image: int
    desc: str
    num: int
    largest: float


@dataclass(frozen=True, eq=False)
class RunErrors:
    """Of one run. min_score: from which on predictions are looked at in the confusion matrix and as label errors."""

    numbers: RunNumbers
    min_score: float

    @classmethod
    def of(cls, numbers: RunNumbers, min_score: float | None) -> RunErrors:
        """min_score: None takes the score of the highest F1."""
        best = numbers.confidence.best
        return cls(numbers, min_score if min_score is not None else best[0] if best else 0.0)

    @cached_property
    def tide(self) -> TideErrors | None:
        """Kinds of errors; None where nothing is annotated."""
        return tide_errors(self.numbers.images)

    @cached_property
    def confusion(self) -> Confusion:
        """Which description is taken for which."""
        return confusion_matrix(self.numbers.images, min_score=self.min_score)

    @cached_property
    def repeated(self) -> list[Repeated]:
        """Most repetitions first."""
        found = []
        for row, image in enumerate(self.numbers.images):
            by_desc: dict[str, dict[int, float]] = {}
            for later, _, iou in repeats(image.pred):
                of_desc = by_desc.setdefault(image.pred.descs[later], {})
                of_desc[later] = max(iou, of_desc.get(later, 0.0))
            found += [Repeated(row, desc, len(ious), max(ious.values())) for desc, ious in by_desc.items()]
        return sorted(found, key=lambda one: (-one.num, one.image, one.desc))

    @property
    def num_repeats(self) -> dict[str, Any]:
        """How many predictions repeat an earlier one, of how many, in how many images."""
        return {
            "run": self.numbers.run.name,
            "num": sum(one.num for one in self.repeated),
            "of": sum(len(image.pred) for image in self.numbers.images),
            "images": len({one.image for one in self.repeated}),
        }

    def as_json(self) -> dict[str, Any]:
        """Every number of the page, and the whole confusion matrix; None stands for nothing."""
        tide = self.tide
        confusion = sorted(
            self.confusion.counts.items(),
            key=lambda item: tuple((name is None, name or "") for name in item[0]),
        )
        return {
            "tide": None
            if tide is None
            else {
                "ap_at_50": tide.ap,
                "errors": {
                    str(kind): {"cost": tide.cost[kind], "num": tide.count[kind], "images": tide.images[kind]}
                    for kind in ErrorKind
                },
                "cost_of_false_positives": tide.cost_of_false_positives,
                "cost_of_false_negatives": tide.cost_of_false_negatives,
            },
            "confusion": {
                "iou": self.confusion.iou,
                "min_score": self.min_score,
                "cells": [
                    {
                        "annotated": cell[0],
                        "predicted": cell[1],
                        "num": num,
                        "images": self.confusion.images[cell],
                    }
                    for cell, num in confusion
                ],
            },
            "duplicates": {
                **{key: value for key, value in self.num_repeats.items() if key != "run"},
                "list": [one._asdict() for one in self.repeated],
            },
        }


@dataclass(frozen=True, eq=False)
class ReportErrors:
    """Of all runs, and what they say of the annotations together.

    links: words -> rows of images, in the order in which tables refer to them; see `link`.
    """

    runs: Sequence[RunErrors]
    links: dict[str, list[int]] = field(default_factory=dict)

    @cached_property
    def findings(self) -> list[LabelError]:
        """Probable label errors."""
        return label_errors(
            [run.numbers.images for run in self.runs], min_scores=[run.min_score for run in self.runs]
        )

    def link(self, words: str, images: Sequence[int]) -> str:
        """Remember images that a table links to, under words that say which they are."""
        self.links[words] = list(images)
        return words

    def groups(self) -> dict[str, list[int]]:
        """Images for the menu of the gallery, of the last run."""
        last = self.runs[-1]
        found = {"duplicates": sorted({one.image for one in last.repeated})}
        if last.tide is not None:
            found |= {f"error {kind}": rows for kind, rows in last.tide.images.items()}
        return found | {"probable label errors": sorted({one.image for one in self.findings})}

    def tide_table(self) -> list[dict[str, Any]]:
        """Rows of kind x run; the last two are costs of all false positives and negatives."""
        if any(run.tide is None for run in self.runs):
            return []
        rows = []
        for kind in ErrorKind:
            cells = []
            for run in self.runs:
                assert run.tide is not None
                rows_of_kind = run.tide.images[kind]
                words = self.link(f"{kind} errors{self._of(run)}", rows_of_kind) if rows_of_kind else None
                cells.append({"cost": run.tide.cost[kind], "num": run.tide.count[kind], "link": words})
            rows.append({"name": str(kind), "meaning": MEANINGS[kind], "cells": cells})
        for name, meaning, attribute in SPECIAL:
            cells = [{"cost": getattr(run.tide, attribute), "num": None, "link": None} for run in self.runs]
            rows.append({"name": name, "meaning": meaning, "cells": cells})
        return rows

    def confusion_tables(self) -> list[dict[str, Any]]:
        """One matrix per run, as rows of cells with their count, share of the row, and link."""
        return [self._confusion_table(run) for run in self.runs]

    def num_repeats(self) -> list[dict[str, Any]]:
        """Of every run."""
        return [run.num_repeats for run in self.runs]

    def findings_json(self) -> list[dict[str, Any]]:
        """Every finding."""
        return [{**asdict(found), "kind": str(found.kind)} for found in self.findings]

    def repeat_table(self) -> list[dict[str, Any]]:
        """The images with most repetitions in the last run."""
        last = self.runs[-1]
        return [
            {
                "title": self._title(one.image),
                "desc": one.desc,
                "num": one.num,
                "largest": one.largest,
                "link": self.link(f"image {self._title(one.image)}", [one.image]),
            }
            for one in last.repeated[:MAX_REPEATS]
        ]

    def finding_cards(self) -> list[dict[str, Any]]:
        """The most suspicious findings with what is to be seen there."""
        run = self.runs[-1].numbers.run
        cards = []
        for found in self.findings[:MAX_FINDINGS]:
            x1, y1, x2, y2 = found.box_xyxy
            edges = (x1, y1, x2 + run.box_extent, y2 + run.box_extent)
            name = self.runs[-1].numbers.images[found.image].file_name
            crop: Crop | None = cropped(run.image_root / name, edges) if name else None
            cards.append(
                {
                    "found": found,
                    "kind": str(found.kind).replace("_", " "),
                    "title": self._title(found.image),
                    "crop": crop,
                    "link": self.link(f"image {self._title(found.image)}", [found.image]),
                }
            )
        return cards

    def _of(self, run: RunErrors) -> str:
        return f" of {run.numbers.run.name}" if len(self.runs) > 1 else ""

    def _title(self, row: int) -> str:
        image = self.runs[-1].numbers.images[row]
        return image.file_name or f"image {image.image_id}"

    def _confusion_table(self, run: RunErrors) -> dict[str, Any]:
        confusion = run.confusion
        listed = confusion.most_confused(MAX_CONFUSED)
        counts, images = _gathered(confusion, set(listed))
        others = [OTHER] if any(OTHER in cell for cell in counts) else []
        names: list[str | None] = [*listed, *others, None]
        rows = []
        for annotated in names:
            total = sum(counts.get((annotated, predicted), 0) for predicted in names)
            cells = [
                self._confusion_cell(run, (annotated, predicted), counts, images, total)
                for predicted in names
            ]
            rows.append({"name": annotated or NOTHING, "cells": cells})
        return {
            "run": run.numbers.run.name,
            "min_score": run.min_score,
            "names": [name or NOTHING for name in names],
            "rows": rows,
        }

    def _confusion_cell(
        self, run: RunErrors, cell: Cell, counts: dict[Cell, int], images: dict[Cell, list[int]], total: int
    ) -> dict[str, Any]:
        annotated, predicted = cell
        number = counts.get(cell, 0)
        link = None
        if number:
            if annotated is None:
                words = f"{predicted} where nothing is annotated"
            elif predicted is None:
                words = f"{annotated} not predicted"
            else:
                words = f"{annotated} predicted as {predicted}"
            link = self.link(f"{words}{self._of(run)}", images[cell])
        return {
            "num": number,
            "share": number / total if total else 0.0,
            "link": link,
            "right": annotated == predicted and annotated != OTHER,
        }


MEANINGS = {
    ErrorKind.CLASS: "right place, wrong description",
    ErrorKind.LOCALISATION: "right description, IoU 0.1 to 0.5",
    ErrorKind.BOTH: "near an object, neither place nor description right",
    ErrorKind.DUPLICATE: "an object that a more confident prediction has",
    ErrorKind.BACKGROUND: "on nothing",
    ErrorKind.MISSED: "objects that none of the first two kinds is about",
}
SPECIAL = (
    ("false positives", "what AP would gain without any", "cost_of_false_positives"),
    ("false negatives", "what AP would gain without any", "cost_of_false_negatives"),
)


def _gathered(confusion: Confusion, listed: set[str]) -> tuple[dict[Cell, int], dict[Cell, list[int]]]:
    """Counts and images with the descriptions that are not listed taken together."""
    counts: dict[Cell, int] = {}
    images: dict[Cell, set[int]] = {}
    for (annotated, predicted), number in confusion.counts.items():
        cell = (_listed(annotated, listed), _listed(predicted, listed))
        counts[cell] = counts.get(cell, 0) + number
        images.setdefault(cell, set()).update(confusion.images[annotated, predicted])
    return counts, {cell: sorted(rows) for cell, rows in images.items()}


def _listed(desc: str | None, listed: set[str]) -> str | None:
    return desc if desc is None or desc in listed else OTHER
