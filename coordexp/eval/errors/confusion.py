"""Which description is taken for which: annotated against predicted, with a row and a column for "nothing".

    confusion = confusion_matrix(images, min_score=0.3)
    confusion.count("cat", "dog"), confusion.missed("cat"), confusion.invented("dog")

Two matchings at IoU 0.5, both one-to-one with as many pairs as possible: first boxes of equal descriptions, as F1 has
it, so that the diagonal holds the true positives; then what is left, whatever its descriptions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from coordexp.eval.box_matching import match_at_threshold
from coordexp.eval.errors.crowds import share_in_crowd
from coordexp.eval.predictions.image_result import ImageResult
from coordexp.geometry import pairwise_iou

IOU = 0.5

Cell = tuple[str | None, str | None]
"""(annotated, predicted) description; None for nothing."""


@dataclass(frozen=True)
class Confusion:
    """counts: of each cell that is not empty.  images: rows of the images that are part of it, ascending."""

    iou: float
    min_score: float
    counts: Mapping[Cell, int]
    images: Mapping[Cell, list[int]]

    def count(self, annotated: str | None, predicted: str | None) -> int:
        """Pairs of these descriptions; None: objects without prediction, or predictions without object."""
        return self.counts.get((annotated, predicted), 0)

    def most_confused(self, most: int) -> list[str]:
        """The descriptions with most entries off the diagonal, then most on it, by name; at most `most`."""
        weight: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
        for (annotated, predicted), number in self.counts.items():
            for desc in {annotated, predicted} - {None}:
                off, on = weight[str(desc)]
                wrong = number * (annotated != predicted)
                weight[str(desc)] = (off + wrong, on + number - wrong)
        by_weight = sorted(weight, key=lambda desc: (*(-n for n in weight[desc]), desc))
        return sorted(by_weight[:most])


def confusion_matrix(images: Sequence[ImageResult], *, min_score: float = 0.0, iou: float = IOU) -> Confusion:
    """Of the predictions with a score of at least `min_score`; those in a crowd region of their description are out."""
    counts: dict[Cell, int] = defaultdict(int)
    found: dict[Cell, list[int]] = defaultdict(list)
    for row, image in enumerate(images):
        cells = _cells(image, min_score, iou)
        for cell in cells:
            counts[cell] += 1
        for cell in dict.fromkeys(cells):
            found[cell].append(row)
    return Confusion(iou, min_score, dict(counts), dict(found))


def _cells(image: ImageResult, min_score: float, iou: float) -> list[Cell]:
    kept = np.flatnonzero(image.pred.scores_N >= min_score)
    truths = np.flatnonzero(~image.gt.crowd_N)
    pred_descs = [image.pred.descs[p] for p in kept.tolist()]
    gt_descs = [image.gt.descs[g] for g in truths.tolist()]
    iou_PG = pairwise_iou(image.pred.boxes_N4[kept], image.gt.boxes_N4[truths])
    same_PG = np.array([[desc == other for other in gt_descs] for desc in pred_descs], dtype=bool).reshape(
        iou_PG.shape
    )
    pairs = match_at_threshold(iou_PG * same_PG, iou)
    for p, g in pairs:
        iou_PG[p], iou_PG[:, g] = 0.0, 0.0
    pairs += match_at_threshold(iou_PG, iou)
    cells: list[Cell] = [(gt_descs[g], pred_descs[p]) for p, g in pairs]
    left_preds = set(range(len(pred_descs))) - {p for p, _ in pairs}
    left_gts = set(range(len(gt_descs))) - {g for _, g in pairs}
    if left_preds and image.gt.crowd_N.any():
        left_preds -= set(np.flatnonzero(share_in_crowd(image)[kept] >= iou).tolist())
    cells += [(None, pred_descs[p]) for p in sorted(left_preds)]
    return cells + [(gt_descs[g], None) for g in sorted(left_gts)]
