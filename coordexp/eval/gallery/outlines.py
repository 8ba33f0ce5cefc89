"""Outlines of the objects of a run: polygons of its predictions file, or of its COCO files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coordexp.errors import RecordError
from coordexp.eval.coco.annotations import Dataset, Results
from coordexp.eval.coco.segmentation import is_run_length, read_outlines
from coordexp.eval.gallery.cards import Outlines
from coordexp.eval.predictions.image_result import ImageId, ImageResult, Objects


@dataclass(frozen=True, eq=False)
class RunOutlines:
    """gt, pred: by image, what the COCO files hold of each object; None where the run is no pair of COCO files."""

    gt: Mapping[ImageId, Sequence[Any]] | None
    pred: Mapping[ImageId, Sequence[Any]] | None

    @classmethod
    def of(cls, coco: tuple[Dataset, Results] | None) -> RunOutlines:
        """Nothing is read until it is asked for. coco: of a run of COCO files."""
        if coco is None:
            return cls(None, None)
        dataset, results = coco
        return cls(_by_image(dataset, dataset), _by_image(results, dataset))

    def of_gt(self, image: ImageResult, index: int) -> Outlines:
        """Parts of an annotated object; empty for a box, and for a mask without outline."""
        return _parts(image.gt, index, None if self.gt is None else self.gt[image.image_id])

    def of_pred(self, image: ImageResult, index: int) -> Outlines:
        """The same of a prediction."""
        return _parts(image.pred, index, None if self.pred is None else self.pred[image.image_id])


def _parts(objects: Objects, index: int, segmentations: Sequence[Any] | None) -> Outlines:
    if segmentations is None:
        points = objects.points[index]
        return [points] if len(points) > 4 else []
    return outline_parts(segmentations[index])


def outline_parts(found: Any) -> Outlines:
    """Parts of a segmentation of a COCO file; empty for run lengths, for nothing, and for what is no outline."""
    if not found or is_run_length(found):
        return []
    try:
        return [part.ravel().tolist() for part in read_outlines(found, "segmentation")]
    except RecordError:  # boxes are compared here: a broken outline is only not drawn
        return []


def _by_image(side: Dataset | Results, dataset: Dataset) -> dict[ImageId, list[Any]]:
    """Segmentations in the order in which `coco_images` has the objects."""
    order = np.argsort(side.image_M, kind="stable")
    counts = np.bincount(side.image_M, minlength=len(dataset.image_ids))
    return {
        image_id: [side.segmentations[m] for m in rows.tolist()]
        for image_id, rows in zip(dataset.image_ids, np.split(order, np.cumsum(counts)[:-1]), strict=True)
    }
