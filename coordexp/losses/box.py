"""Boxes: decoding coordinates from logits, smooth L1 and complete-IoU loss.

Boxes are (x_min, y_min, x_max, y_max) in units of the image side, [0, 1].
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from coordexp.errors import ConfigError
from coordexp.losses.coord import CoordDistribution
from coordexp.losses.sums import SumCount, math_dtype, sum_count

DecodeMode = Literal["exp", "st", "hard"]
SIDE_FLOOR = 1e-12
"""Least side of a box in the CIoU: a floor, never added."""


def expectation_decode(logits_NK: Tensor, *, temperature: float = 1.0, mode: DecodeMode = "exp") -> Tensor:
    """Coordinates in [0, 1] from coordinate logits, [N].

    mode `exp`: c = E_p k / (K - 1) with p = softmax(z / T); `hard`: argmax / (K - 1), no gradient;
    `st`: the value of `hard` with the gradient of `exp` (straight-through).
    logits_NK: float [N, K]. Raises ConfigError for another mode.
    """
    return decode(CoordDistribution(logits_NK, temperature), mode)


def decode(dist: CoordDistribution, mode: DecodeMode) -> Tensor:
    """`expectation_decode` on a shared distribution."""
    if mode not in get_args(DecodeMode):
        raise ConfigError(f"coord_decode_mode = {mode!r}: expected one of {', '.join(get_args(DecodeMode))}")
    if mode == "exp":
        return dist.expected_bin_N / (dist.num_bins - 1)
    hard_N = dist.logits_NK.argmax(-1).to(dist.logits_NK.dtype) / (dist.num_bins - 1)
    if mode == "hard":
        return hard_N
    soft_N = dist.expected_bin_N / (dist.num_bins - 1)
    return hard_N + (soft_N - soft_N.detach())


def bbox_smoothl1(pred_B4: Tensor, gt_B4: Tensor) -> SumCount:
    """Smooth L1 with beta = 1 on raw corner coordinates.

    Same as: F.smooth_l1_loss(pred, gt, beta=1.0, reduction="sum"). Returns the sum over the 4B
    coordinates, and 4B.
    """
    return sum_count(F.smooth_l1_loss(math_dtype(pred_B4), math_dtype(gt_B4), beta=1.0, reduction="none"))


def bbox_ciou(pred_B4: Tensor, gt_B4: Tensor) -> SumCount:
    """Complete-IoU loss 1 - CIoU (Zheng et al. 2020, arXiv:1911.08287).

    iou = intersection / union;  rho^2 / c^2 = centre distance^2 / enclosing diagonal^2;
    v = 4 / pi^2 (atan(w_gt / h_gt) - atan(w / h))^2;  alpha = v / (1 - iou + v), a constant for the gradient as
    in the paper;  loss = 1 - iou + rho^2 / c^2 + alpha v. Corners are first put in order by min / max and clamped
    to [0, 1]. Every side, that of an overlap included, is at least SIDE_FLOOR: nothing is divided by 0, equal boxes
    of any size have loss 0, and swapped and degenerate boxes give finite values and gradients.

    Same as: torchvision.ops.complete_box_iou_loss(1000 * pred, 1000 * gt, reduction="sum"), whose 1e-7 added to
    union and diagonal is nothing to boxes of that size (on boxes in [0, 1] it gives equal boxes of one bin 0.09).
    pred_B4, gt_B4: float [B, 4]. Returns the sum over the B boxes, and B.
    """
    pred_B4, gt_B4 = _canonical(math_dtype(pred_B4)), _canonical(math_dtype(gt_B4))
    size_p_B2, size_g_B2 = (_sides(boxes_B4[:, :2], boxes_B4[:, 2:]) for boxes_B4 in (pred_B4, gt_B4))
    inner_low_B2 = torch.maximum(pred_B4[:, :2], gt_B4[:, :2])
    inner_high_B2 = torch.minimum(pred_B4[:, 2:], gt_B4[:, 2:])
    meets_B2 = inner_low_B2 <= inner_high_B2
    inter_B = _area(torch.where(meets_B2, _sides(inner_low_B2, inner_high_B2), 0.0))
    iou_B = inter_B / (_area(size_p_B2) + _area(size_g_B2) - inter_B)

    outer_low_B2 = torch.minimum(pred_B4[:, :2], gt_B4[:, :2])
    outer_high_B2 = torch.maximum(pred_B4[:, 2:], gt_B4[:, 2:])
    corner_gap_B4 = pred_B4 - gt_B4
    centre_gap_B2 = (corner_gap_B4[:, :2] + corner_gap_B4[:, 2:]) / 2
    centre_term_B = centre_gap_B2.square().sum(-1) / _sides(outer_low_B2, outer_high_B2).square().sum(-1)

    v_B = (4 / math.pi**2) * (_aspect_angle(size_g_B2) - _aspect_angle(size_p_B2)).square()
    alpha_B = (v_B / ((1 - iou_B).clamp(min=0) + v_B).clamp(min=SIDE_FLOOR)).detach()
    return sum_count(1 - iou_B + centre_term_B + alpha_B * v_B)


def _canonical(boxes_B4: Tensor) -> Tensor:
    """Corners in order and inside the unit square."""
    a_B2, b_B2 = boxes_B4[:, :2], boxes_B4[:, 2:]
    return torch.cat([torch.minimum(a_B2, b_B2), torch.maximum(a_B2, b_B2)], dim=-1).clamp(0, 1)


def _sides(low_B2: Tensor, high_B2: Tensor) -> Tensor:
    """Width and height, at least SIDE_FLOOR, [B, 2]."""
    return (high_B2 - low_B2).clamp(min=SIDE_FLOOR)


def _area(size_B2: Tensor) -> Tensor:
    """w * h, [B]; written out because the backward pass of `prod` waits for the device."""
    return size_B2[:, 0] * size_B2[:, 1]


def _aspect_angle(size_B2: Tensor) -> Tensor:
    """atan(w / h), [B]."""
    return torch.atan(size_B2[:, 0] / size_B2[:, 1])
