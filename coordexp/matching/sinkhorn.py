"""Soft vertex targets for a matched pair of polygons: entropic optimal transport, projected onto points.

The vertices of a predicted polygon and of its ground truth rarely correspond one to one. Sinkhorn's
algorithm spreads each predicted vertex over the ground-truth vertices; its target is the mean of those,
weighted by the transport plan (the barycentric projection): a convex combination of ground-truth vertices.

The iteration is written here, in the log domain on numpy. POT (Python Optimal Transport), the well-kept
library for it, imports scikit-learn, torch and every other array framework it finds when it is imported;
matching stays free of torch, and the algorithm is two lines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from coordexp.errors import ContractError
from coordexp.geometry import FloatArray, polygon_points

OT_COSTS = ("l1", "l2")


def barycentric_targets(
    pred_bins: Sequence[float],
    gt_bins: Sequence[float],
    *,
    ot_cost: str = "l2",
    ot_epsilon: float = 10.0,
    ot_iters: int = 30,
) -> FloatArray:
    """Target point of every vertex of a predicted polygon, for the ground-truth polygon it was matched to.

    pred_bins, gt_bins: flat polygons (x0, y0, x1, y1, ...) in bins, of N and M vertices.
    ot_cost: "l1" |dx| + |dy| or "l2" sqrt(dx^2 + dy^2) between vertices, in bins.
    ot_epsilon: entropic regularisation > 0, in bins; smaller is closer to a hard assignment and needs more
    iterations.  ot_iters: Sinkhorn iterations >= 1.
    Returns float64 [N, 2], points (x, y) in bins, not rounded.  Raises ContractError for an unusable option.
    """
    pred_N2, gt_M2 = polygon_points(pred_bins), polygon_points(gt_bins)
    plan_NM = sinkhorn_plan(point_cost(pred_N2, gt_M2, ot_cost), ot_epsilon, ot_iters)
    targets: FloatArray = plan_NM @ gt_M2 / plan_NM.sum(axis=1, keepdims=True)
    return targets


def point_cost(points_N2: FloatArray, points_M2: FloatArray, ot_cost: str) -> FloatArray:
    """Distance of every pair of points in their unit, by "l1" or "l2".  Returns float64 [N, M]."""
    offsets_NM2 = points_N2[:, None] - points_M2[None]
    if ot_cost == "l1":
        distance: FloatArray = np.abs(offsets_NM2).sum(axis=-1)
    elif ot_cost == "l2":
        distance = np.hypot(offsets_NM2[..., 0], offsets_NM2[..., 1])
    else:
        raise ContractError(f"ot_cost is {ot_cost!r}: expected one of {', '.join(OT_COSTS)}")
    return distance


def sinkhorn_plan(cost_NM: FloatArray, epsilon: float, iters: int) -> FloatArray:
    """Entropic transport plan between uniform weights 1/N and 1/M, after `iters` Sinkhorn iterations.

    Minimises sum P C + epsilon * sum P (log P - 1) over plans of these marginals (Cuturi 2013; log domain:
    Peyre and Cuturi, Computational Optimal Transport, 4.4). An iteration fits the rows, then the columns: the
    column sums of the result are exact, and its row sums converge.

    cost_NM: float64 [N, M], finite.  Returns float64 [N, M], non-negative, sum 1.
    """
    if not (math.isfinite(epsilon) and epsilon > 0.0):
        raise ContractError(f"ot_epsilon is {epsilon}: expected a finite number above 0")
    if iters < 1:
        raise ContractError(f"ot_iters is {iters}: expected at least 1 iteration")
    log_kernel_NM = -cost_NM / epsilon
    log_rows_N1 = np.full((cost_NM.shape[0], 1), -math.log(cost_NM.shape[0]))
    log_columns_1M = np.full((1, cost_NM.shape[1]), -math.log(cost_NM.shape[1]))
    log_v_1M = np.zeros_like(log_columns_1M)
    for _ in range(iters):
        log_u_N1 = log_rows_N1 - np.logaddexp.reduce(log_kernel_NM + log_v_1M, axis=1, keepdims=True)
        log_v_1M = log_columns_1M - np.logaddexp.reduce(log_kernel_NM + log_u_N1, axis=0, keepdims=True)
    plan: FloatArray = np.exp(log_u_N1 + log_kernel_NM + log_v_1M)
    return plan
