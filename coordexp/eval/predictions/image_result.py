"""One image of an evaluation: what is there, what was predicted, and what became of the answer.

The one value behind average precision, F1, the numbers on policy and the report; made from a line of a predictions
file, from COCO files, or in training from a rollout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordexp.codec.descs import canonical_desc
from coordexp.codec.schema import KIND_BBOX, KIND_POLY, BoxObject
from coordexp.errors import ContractError
from coordexp.eval.predictions.checked_classes import CheckedClasses
from coordexp.geometry import (
    FloatArray,
    aligned_iou,
    box_areas,
    dequantize_points,
    polygon_area,
    polygon_box,
    quantize_points,
)
from coordexp.matching import MatchResult, match_objects

ImageId = int | str

Points = Sequence[float]
"""Flat pixel coordinates: a box x1, y1, x2, y2, or a polygon x1, y1, x2, y2, ... of at least three points."""


@dataclass(frozen=True, eq=False)
class Objects:
    """N objects of one image, in pixels.

    descs: their descriptions, in the canonical form.  points: of each, see `Points`.
    boxes_N4: float64 xyxy, around polygons.  areas_N: square pixels.
    scores_N: float64, 1.0 where there is none.  crowd_N: regions of many objects, which are neither hits nor misses.
    written_descs: what the file or the model says, where `descs` holds the category that it was taken for.
    """

    descs: Sequence[str]
    points: Sequence[Points]
    boxes_N4: FloatArray
    areas_N: FloatArray
    scores_N: FloatArray
    crowd_N: NDArray[np.bool_]
    written_descs: Sequence[str]

    @classmethod
    def of(
        cls,
        descs: Sequence[str],
        points: Sequence[Points],
        *,
        scores: Sequence[float] | FloatArray | None = None,
        crowd: Sequence[bool] | NDArray[np.bool_] | None = None,
        areas: FloatArray | None = None,
    ) -> Objects:
        """Objects with score 1.0, no crowd and the areas of their shapes unless given.

        Raises ContractError unless there is one of each per description.
        """
        boxes = [p if len(p) == 4 else polygon_box(p).tolist() for p in points]
        boxes_N4 = np.array(boxes, dtype=np.float64).reshape(-1, 4)
        found = cls(
            descs=list(map(canonical_desc, descs)),
            points=points,
            boxes_N4=boxes_N4,
            areas_N=_areas(points, boxes_N4) if areas is None else areas,
            scores_N=np.ones(len(descs)) if scores is None else np.asarray(scores, dtype=np.float64),
            crowd_N=np.zeros(len(descs), dtype=bool) if crowd is None else np.asarray(crowd, dtype=bool),
            written_descs=descs,
        )
        lengths = [len(descs), len(points), len(found.areas_N), len(found.scores_N), len(found.crowd_N)]
        if len(set(lengths)) > 1:
            raise ContractError(
                f"numbers of descs, points, areas, scores and crowd flags are {lengths}: expected as many of each"
            )
        return found

    def __len__(self) -> int:
        return len(self.descs)

    def renamed(self, desc_map: Mapping[str, str]) -> Objects:
        """With descriptions replaced by what `desc_map` takes them for."""
        if desc_map.keys().isdisjoint(self.descs):
            return self
        return replace(self, descs=[desc_map.get(desc, desc) for desc in self.descs])

    def rows(self, *, scored: bool) -> list[dict[str, Any]]:
        """As a predictions file holds them; `written_desc` where that is another one."""
        rows: list[dict[str, Any]] = [
            {"type": kind_of(points), "points": points, "desc": desc}
            for desc, points in zip(self.descs, self.points, strict=True)
        ]
        for index in np.flatnonzero(self.crowd_N).tolist():
            rows[index]["crowd"] = True
        if scored:
            for row, score in zip(rows, self.scores_N.tolist(), strict=True):
                row["score"] = score
        for row, written in zip(rows, self.written_descs, strict=True):
            if written != row["desc"]:
                row["written_desc"] = written
        return rows


@dataclass(frozen=True, eq=False)
class ImageResult:
    """One image.

    width, height: 0 where they are not known.
    errors: what the parser dropped and scoring left out, by reason, and `truncated`, `invalid_rollout` of the answer.
    match: of predictions and ground truth by mask IoU, as stage 2 matches them; None where nobody asked for it.
    checked: classes that annotators looked for, where the data says so (LVIS).
    """

    image_id: ImageId
    file_name: str
    width: int
    height: int
    gt: Objects
    pred: Objects
    errors: Mapping[str, int] = field(default_factory=dict)
    match: MatchResult | None = None
    checked: CheckedClasses | None = None

    def bins(self, objects: Objects) -> list[BoxObject]:
        """`objects` in bins of this image."""
        return [
            BoxObject(desc, kind_of(points), tuple(self._bins(points)))
            for desc, points in zip(objects.descs, objects.points, strict=True)
        ]

    def matched(self, gate: float) -> ImageResult:
        """With the match of stage 2: mask IoU of at least `gate`, descriptions not looked at."""
        return replace(self, match=match_objects(self.bins(self.pred), self.bins(self.gt), gate=gate))

    def _bins(self, points: Points) -> list[int]:
        pairs = np.asarray(points, dtype=np.float64).reshape(-1, 2)
        bins: list[int] = quantize_points(pairs, self.width, self.height).ravel().tolist()
        return bins


def duplicate_rate(objects: Objects, least: float = 0.9) -> float:
    """Share of the objects that an earlier one of the same description covers with an IoU above `least`; 0 for none."""
    return len({later for later, _, _ in repeats(objects, least)}) / len(objects) if len(objects) else 0.0


def repeats(objects: Objects, least: float = 0.9) -> list[tuple[int, int, float]]:
    """(later, earlier, IoU) of all objects of one description with an IoU above `least`, ascending."""
    labels: dict[str, int] = {}
    label_N = np.array([labels.setdefault(desc, len(labels)) for desc in objects.descs], dtype=np.int64)
    if len(labels) == len(label_N):
        return []
    later, earlier = np.nonzero(np.tri(len(label_N), k=-1, dtype=bool) & (label_N[:, None] == label_N))
    iou = aligned_iou(objects.boxes_N4[later], objects.boxes_N4[earlier])
    kept = iou > least
    return list(zip(later[kept].tolist(), earlier[kept].tolist(), iou[kept].tolist(), strict=True))


def objects_of(
    objects: Sequence[BoxObject], width: int, height: int, scores: Sequence[float] | None = None
) -> Objects:
    """Objects given in bins of an image of this size."""
    return Objects.of(
        [obj.desc for obj in objects], [to_pixels(obj, width, height) for obj in objects], scores=scores
    )


def kind_of(points: Points) -> str:
    """ "bbox_2d" or "poly"."""
    return KIND_BBOX if len(points) == 4 else KIND_POLY


def to_pixels(obj: BoxObject, width: int, height: int) -> list[float]:
    """Flat pixel coordinates x, y, x, y, ... of an object's bins."""
    pairs = [obj.bins[at : at + 2] for at in range(0, len(obj.bins), 2)]
    pixels: list[float] = dequantize_points(pairs, width, height).ravel().tolist()
    return pixels


def _areas(points: Sequence[Points], boxes_N4: FloatArray) -> FloatArray:
    """Of each box or polygon.  float64 [N]"""
    areas = box_areas(boxes_N4)
    for index, values in enumerate(points):
        if len(values) != 4:
            areas[index] = polygon_area(values)
    return areas
