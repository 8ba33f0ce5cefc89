"""Probable errors of the annotations, as the answers of one or several models suggest them.

    findings = label_errors([run_a.images, run_b.images], min_scores=[0.3, 0.5])
    write_label_errors(Path("label_errors.jsonl"), findings, run_a.images, Path("data"))

Three kinds, each with a score in [0, 1] that ranks them together:

- unannotated: a confident prediction where no annotation is (IoU below 0.3 with every one, and not in a crowd region);
  its score x (1 - the largest IoU);
- not_found: an annotation that no prediction of any model overlaps with an IoU of 0.3, whatever its description and
  score; the share of annotations of its description that were found (IoU 0.5) x (1 - the largest IoU);
- wrong_name: an annotation that a confident prediction of another description covers with an IoU of at least 0.7, while
  that model says its own description nowhere near; its score x the IoU.

These are suspicions: a model that misses a class tells nothing about its annotations, which is why the share is in.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from coordexp.codec.schema import KIND_BBOX, NUM_BINS, BoxObject
from coordexp.eval.errors.crowds import share_in_crowd
from coordexp.eval.predictions.image_result import ImageResult, Objects, Points
from coordexp.files import write_jsonl
from coordexp.geometry import FloatArray, pairwise_iou

NEAR_IOU, SAME_IOU, COVERING_IOU = 0.3, 0.5, 0.7
"""IoU below which a box is somewhere else, from which on it is the same object, and from which on only names differ."""


class LabelErrorKind(StrEnum):
    """See above."""

    UNANNOTATED = "unannotated"
    NOT_FOUND = "not_found"
    WRONG_NAME = "wrong_name"


@dataclass(frozen=True)
class LabelError:
    """One finding.

    image: its row.  desc, points: what the object should be looked at as: the prediction, or the annotation under
    the predicted description.  annotated: what the annotation says, None where there is none.
    num_models: how many models say so.
    """

    kind: LabelErrorKind
    image: int
    desc: str
    points: Points
    box_xyxy: tuple[float, float, float, float]
    annotated: str | None
    score: float
    reason: str
    num_models: int = 1


def label_errors(
    answers: Sequence[Sequence[ImageResult]], *, min_scores: Sequence[float]
) -> list[LabelError]:
    """All findings, most suspicious first.

    answers: of every model its images, of the same data in the same order.  min_scores: of each model, the score from
    which on its predictions are confident.
    """
    share_found = _share_found(answers)
    findings: list[LabelError] = []
    for row, of_models in enumerate(zip(*answers, strict=True)):
        kept = [
            np.flatnonzero(image.pred.scores_N >= least).tolist()
            for image, least in zip(of_models, min_scores, strict=True)
        ]
        findings += _unannotated(row, of_models, kept)
        findings += _of_annotations(row, of_models, kept, share_found)
    return sorted(findings, key=lambda found: (-found.score, found.image, found.kind, found.box_xyxy))


def label_error_record(
    found: LabelError, images: Sequence[ImageResult], image_root: Path, folder: Path
) -> dict[str, Any]:
    """A finding as a record of our data format, which `coordexp data check`, `convert` and `view` read.

    folder: of the file it will stand in; the picture's path starts there.
    """
    image = images[found.image]
    [shape] = image.bins(Objects.of([found.desc], [found.points]))
    return {
        "images": [os.path.relpath(image_root / (image.file_name or str(image.image_id)), folder)],
        "width": image.width,
        "height": image.height,
        "objects": [{"desc": found.desc, shape.kind: list(_with_extent(shape).bins)}],
        "metadata": {
            "kind": str(found.kind),
            "score": round(found.score, 6),
            "reason": found.reason,
            "box_xyxy": [round(value, 2) for value in found.box_xyxy],
            "annotated": found.annotated,
            "num_models": found.num_models,
            "image_id": image.image_id,
        },
    }


def write_label_errors(
    path: Path, findings: Sequence[LabelError], images: Sequence[ImageResult], image_root: Path
) -> None:
    """One line per finding, see `label_error_record`."""
    folder = path.resolve().parent
    write_jsonl(path, [label_error_record(found, images, image_root.resolve(), folder) for found in findings])


def _share_found(answers: Sequence[Sequence[ImageResult]]) -> dict[str, float]:
    """Of the annotations of each description, the share that some model found."""
    total: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for of_models in zip(*answers, strict=True):
        gt = of_models[0].gt
        hit = np.zeros(len(gt), dtype=bool)
        for image in of_models:
            hit |= ((_iou(image) * _same(image)) >= SAME_IOU).any(axis=0)
        total.update(desc for desc, crowd in zip(gt.descs, gt.crowd_N, strict=True) if not crowd)
        found.update(
            desc for desc, crowd, one in zip(gt.descs, gt.crowd_N, hit, strict=True) if one and not crowd
        )
    return {desc: found[desc] / number for desc, number in total.items()}


def _unannotated(
    row: int, of_models: Sequence[ImageResult], kept: Sequence[Sequence[int]]
) -> list[LabelError]:
    candidates = []
    for model, (image, rows) in enumerate(zip(of_models, kept, strict=True)):
        if not rows:
            continue
        largest_P = _iou(image).max(axis=1, initial=0.0)
        in_crowd_P = share_in_crowd(image, any_desc=True) >= SAME_IOU
        for p in rows:
            if largest_P[p] < NEAR_IOU and not in_crowd_P[p]:
                score = float(image.pred.scores_N[p]) * (1.0 - float(largest_P[p]))
                candidates.append((score, model, p, float(largest_P[p])))
    findings: list[LabelError] = []
    models_of: list[set[int]] = []
    for score, model, p, largest in sorted(candidates, key=lambda one: (-one[0], one[1:])):
        pred = of_models[model].pred
        box = pred.boxes_N4[p]
        known = pairwise_iou([found.box_xyxy for found in findings], box[None])[:, 0] >= SAME_IOU
        if known.any():  # another model, or a repetition
            models_of[int(known.argmax())].add(model)
            continue
        said = f"{pred.descs[p]} predicted with score {pred.scores_N[p]:.2f}"
        reason = f"{said}, where no annotation is (largest IoU {largest:.2f})"
        findings.append(
            LabelError(
                LabelErrorKind.UNANNOTATED,
                row,
                pred.descs[p],
                pred.points[p],
                _xyxy(box),
                None,
                score,
                reason,
            )
        )
        models_of.append({model})
    return [
        _agreed(found, len(models), len(of_models)) for found, models in zip(findings, models_of, strict=True)
    ]


def _of_annotations(
    row: int,
    of_models: Sequence[ImageResult],
    kept: Sequence[Sequence[int]],
    share_found: dict[str, float],
) -> list[LabelError]:
    gt = of_models[0].gt
    ious = [_iou(image) for image in of_models]
    sames = [_same(image) for image in of_models]
    findings = []
    for g in np.flatnonzero(~gt.crowd_N).tolist():
        largest = max(float(iou_PG[:, g].max(initial=0.0)) for iou_PG in ious)
        box, desc = _xyxy(gt.boxes_N4[g]), gt.descs[g]
        if largest < NEAR_IOU:
            share = share_found[desc]
            reason = (
                f"annotated as {desc}, but no prediction is near (largest IoU {largest:.2f}); "
                f"{share:.0%} of the annotations of {desc} are found"
            )
            findings.append(
                LabelError(
                    LabelErrorKind.NOT_FOUND, row, desc, gt.points[g], box, desc, share * (1.0 - largest), reason,
                    len(of_models),
                )
            )  # fmt: skip
            continue
        renamed = [
            (float(image.pred.scores_N[p]) * float(iou_PG[p, g]), model, p)
            for model, (image, rows, iou_PG, same_PG) in enumerate(
                zip(of_models, kept, ious, sames, strict=True)
            )
            if not ((iou_PG[:, g] >= SAME_IOU) & same_PG[:, g]).any()
            for p in rows
            if iou_PG[p, g] >= COVERING_IOU and not ((iou_PG[p] >= SAME_IOU) & same_PG[p]).any()
        ]
        if renamed:
            score, model, p = max(renamed, key=lambda one: (one[0], -one[1], -one[2]))
            pred, iou = of_models[model].pred, ious[model][p, g]
            said = f"predicted as {pred.descs[p]} with score {pred.scores_N[p]:.2f}"
            reason = f"annotated as {desc}, {said} (IoU {iou:.2f})"
            found = LabelError(
                LabelErrorKind.WRONG_NAME, row, pred.descs[p], gt.points[g], box, desc, score, reason
            )
            same_name = {m for _, m, q in renamed if of_models[m].pred.descs[q] == pred.descs[p]}
            findings.append(_agreed(found, len(same_name), len(of_models)))
    return findings


def _agreed(found: LabelError, num_models: int, of: int) -> LabelError:
    """With the number of models that say so, where there are several."""
    if of == 1:
        return found
    return replace(found, num_models=num_models, reason=f"{found.reason}; {num_models} of {of} runs say so")


def _iou(image: ImageResult) -> FloatArray:
    """IoU of every prediction with every annotation, 0 for crowd regions.  [P, G]"""
    return pairwise_iou(image.pred.boxes_N4, image.gt.boxes_N4) * ~image.gt.crowd_N


def _same(image: ImageResult) -> Any:
    """Whether descriptions are equal.  bool [P, G]"""
    pred, gt = (np.array(side.descs, dtype=object) for side in (image.pred, image.gt))
    return np.equal(pred[:, None], gt[None, :]).astype(bool).reshape(len(pred), len(gt))


def _xyxy(box_4: FloatArray) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = box_4.tolist()
    return x1, y1, x2, y2


def _with_extent(shape: BoxObject) -> BoxObject:
    """A box whose sides are at least one bin, as records need them."""
    if shape.kind != KIND_BBOX:
        return shape
    low, high = np.array(shape.bins[:2]), np.array(shape.bins[2:])
    low = np.minimum(low, NUM_BINS - 2)
    high = np.maximum(high, low + 1)
    return replace(shape, bins=(*low.tolist(), *high.tolist()))
