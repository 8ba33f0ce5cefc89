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
from coordexp.losses.distribution import CoordDistribution
from coordexp.losses.sums import SumCount, math_dtype, sum_count

DecodeMode = Literal["exp", "st", "hard"]
EPS = 1e-7


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
    """Complete-IoU loss 1 - CIoU (Zheng et al. 2020, arXiv:1911.08287), as torchvision computes it.

    iou = intersection / (union + eps);  rho^2 / c^2 = centre distance^2 / (enclosing diagonal^2 + eps);
    v = 4 / pi^2 (atan(w_gt / h_gt) - atan(w / h))^2;  alpha = v / (1 - iou + v + eps), a constant for the
    gradient as in the paper;  loss = 1 - iou + rho^2 / c^2 + alpha v. eps = 1e-7, also the least side.
    Corners are first put in order by min / max and clamped to [0, 1], so swapped and degenerate boxes give
    finite values and gradients. pred_B4, gt_B4: float [B, 4]. Returns the sum over the B boxes, and B.
    """
    pred_B4, gt_B4 = _canonical(math_dtype(pred_B4)), _canonical(math_dtype(gt_B4))
    size_p_B2, size_g_B2 = pred_B4[:, 2:] - pred_B4[:, :2], gt_B4[:, 2:] - gt_B4[:, :2]
    overlap_B2 = torch.minimum(pred_B4[:, 2:], gt_B4[:, 2:]) - torch.maximum(pred_B4[:, :2], gt_B4[:, :2])
    inter_B = _area(overlap_B2.clamp(min=0))
    iou_B = inter_B / (_area(size_p_B2) + _area(size_g_B2) - inter_B + EPS)

    enclosing_B2 = torch.maximum(pred_B4[:, 2:], gt_B4[:, 2:]) - torch.minimum(pred_B4[:, :2], gt_B4[:, :2])
    centre_gap_B2 = (pred_B4[:, :2] + pred_B4[:, 2:] - gt_B4[:, :2] - gt_B4[:, 2:]) / 2
    centre_term_B = centre_gap_B2.square().sum(-1) / (enclosing_B2.square().sum(-1) + EPS)

    v_B = (4 / math.pi**2) * (_aspect_angle(size_g_B2) - _aspect_angle(size_p_B2)).square()
    alpha_B = (v_B / (1 - iou_B + v_B + EPS)).detach()
    return sum_count(1 - iou_B + centre_term_B + alpha_B * v_B)


def _canonical(boxes_B4: Tensor) -> Tensor:
    """Corners in order and inside the unit square."""
    a_B2, b_B2 = boxes_B4[:, :2], boxes_B4[:, 2:]
    return torch.cat([torch.minimum(a_B2, b_B2), torch.maximum(a_B2, b_B2)], dim=-1).clamp(0, 1)


def _area(size_B2: Tensor) -> Tensor:
    """w * h, [B]; written out because the backward pass of `prod` waits for the device."""
    return size_B2[:, 0] * size_B2[:, 1]


def _aspect_angle(size_B2: Tensor) -> Tensor:
    """atan(w / h) with sides of at least eps, [B]."""
    width_B, height_B = size_B2.clamp(min=EPS).unbind(-1)
    return torch.atan(width_B / height_B)
