"""One-to-one matching of predicted and ground-truth objects of an image, by mask IoU.

match = match_objects(preds, gts)
for pred, gt in match.matched: ...
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from coordexp.errors import ContractError
from coordexp.matching.cost import (
    Shape,
    augmented_cost,
    candidate_pairs,
    outlines_of,
    pairwise_mask_iou,
)


@dataclass(frozen=True)
class MatchResult:
    """Who belongs to whom in one image. Indices point into the `preds` and `gts` that were matched.

    matched: (pred, gt) index pairs, ascending by pred.  maskious: mask IoU of each of these pairs.
    unmatched_pred, unmatched_gt: the other indices, ascending.
    num_candidates: candidate pairs that were looked at.  gating_rejections: those among them under the gate.
    """

    matched: list[tuple[int, int]]
    maskious: list[float]
    unmatched_pred: list[int]
    unmatched_gt: list[int]
    num_candidates: int
    gating_rejections: int

    @property
    def maskiou_sum(self) -> float:
        """Sum of mask IoU over the matched pairs, correctly rounded (whatever the order of the pairs)."""
        return math.fsum(self.maskious)


def match_objects(
    preds: Sequence[Shape],
    gts: Sequence[Shape],
    *,
    top_k: int = 10,
    gate: float = 0.3,
    resolution: int = 256,
    fp_cost: float = 1.0,
    fn_cost: float = 1.0,
) -> MatchResult:
    """Match predictions to ground truths at the least total cost; boxes and polygons may pair in any way.

    A matched pair costs 1 - maskIoU, an unmatched prediction `fp_cost`, an unmatched ground truth `fn_cost`.
    A pair may be matched only if it is a candidate (`cost.candidate_pairs`) with maskIoU >= gate.

    The result is a function of the geometry: the assignment is solved with both sides in the order of their
    coordinates, so permuting `preds` permutes the result even where several assignments cost the same.
    Only objects of equal kind and bins cannot be told apart: among those the earlier one is matched first.
    The same for `gts`, unless the `top_k` cut falls between equally good candidates (lower index stays).

    top_k: candidates per prediction, >= 1.  gate: least maskIoU, in [0, 1].  resolution: canvas side, >= 2.
    fp_cost, fn_cost: finite, >= 0.  Raises ContractError for a malformed object or option.
    """
    _check_options(top_k, gate, resolution, fp_cost, fn_cost)
    pred_outlines, gt_outlines = outlines_of(preds, "preds"), outlines_of(gts, "gts")
    is_candidate_PG = candidate_pairs(pred_outlines.boxes_xyxy, gt_outlines.boxes_xyxy, top_k)
    mask_iou_PG = pairwise_mask_iou(pred_outlines, gt_outlines, resolution)
    feasible_PG = is_candidate_PG & (mask_iou_PG >= gate)

    pred_keys, gt_keys = _geometry_keys(preds), _geometry_keys(gts)
    pred_order, gt_order = _order_of(pred_keys), _order_of(gt_keys)
    canonical = np.ix_(pred_order, gt_order)
    cost = augmented_cost(mask_iou_PG[canonical], feasible_PG[canonical], fp_cost, fn_cost)
    rows, columns = linear_sum_assignment(cost)
    is_pair = (rows < len(preds)) & (columns < len(gts))
    partners = [(pred_order[r], gt_order[c]) for r, c in zip(rows[is_pair], columns[is_pair], strict=True)]
    matched = sorted(_earlier_twins_first(partners, pred_keys, gt_keys))

    num_candidates = int(is_candidate_PG.sum())
    matched_preds, matched_gts = {p for p, _ in matched}, {g for _, g in matched}
    return MatchResult(
        matched=matched,
        maskious=[float(mask_iou_PG[pair]) for pair in matched],
        unmatched_pred=[p for p in range(len(preds)) if p not in matched_preds],
        unmatched_gt=[g for g in range(len(gts)) if g not in matched_gts],
        num_candidates=num_candidates,
        gating_rejections=num_candidates - int(feasible_PG.sum()),
    )


GeometryKey = tuple[str, tuple[float, ...]]
Pairs = list[tuple[int, int]]


def _geometry_keys(shapes: Sequence[Shape]) -> list[GeometryKey]:
    """What tells two shapes apart, equal for equal bins of any numeric type."""
    return [(shape.kind, tuple(float(value) for value in shape.bins)) for shape in shapes]


def _order_of(keys: Sequence[GeometryKey]) -> list[int]:
    """Indices in ascending order of geometry, the earlier twin first."""
    return sorted(range(len(keys)), key=keys.__getitem__)


def _earlier_twins_first(
    pairs: Pairs, pred_keys: Sequence[GeometryKey], gt_keys: Sequence[GeometryKey]
) -> Pairs:
    """The same assignment with matched objects of equal geometry swapped for their earliest twins.

    Ground truths keep their rank among their twins: an earlier twin is a candidate wherever a later one is,
    while the `top_k` cut may have dropped the later one.
    """
    gt_group, pred_group = _indices_by_key(gt_keys), _indices_by_key(pred_keys)
    by_gt = sorted(pairs, key=lambda pair: pair[1])
    taken: Counter[GeometryKey] = Counter()
    earliest_gts = []
    for pred, gt in by_gt:
        key = gt_keys[gt]
        earliest_gts.append((pred, gt_group[key][taken[key]]))
        taken[key] += 1
    earliest_gts.sort(key=lambda pair: (gt_keys[pair[1]], pair[1]))
    taken.clear()
    earliest = []
    for pred, gt in earliest_gts:
        key = pred_keys[pred]
        earliest.append((pred_group[key][taken[key]], gt))
        taken[key] += 1
    return earliest


def _indices_by_key(keys: Sequence[GeometryKey]) -> dict[GeometryKey, list[int]]:
    groups: dict[GeometryKey, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        groups[key].append(index)
    return groups


def _check_options(top_k: int, gate: float, resolution: int, fp_cost: float, fn_cost: float) -> None:
    if top_k < 1:
        raise ContractError(f"top_k is {top_k}: expected at least 1 candidate per prediction")
    if not 0.0 <= gate <= 1.0:
        raise ContractError(f"gate is {gate}: expected a mask IoU between 0 and 1")
    if resolution < 2:
        raise ContractError(f"resolution is {resolution}: expected a canvas side of at least 2 pixels")
    for name, value in (("fp_cost", fp_cost), ("fn_cost", fn_cost)):
        if not (math.isfinite(value) and value >= 0.0):
            raise ContractError(f"{name} is {value}: expected a finite cost of at least 0")
