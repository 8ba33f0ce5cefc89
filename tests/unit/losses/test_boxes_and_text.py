"""Box decoding, smooth L1, CIoU and token cross-entropy against their references."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import complete_box_iou_loss

from coordexp.errors import ConfigError
from coordexp.losses.box import bbox_ciou, bbox_smoothl1, expectation_decode
from coordexp.losses.inputs import cross_entropy_rows

unit = st.floats(0, 1, width=32)


def ordinary_boxes(num_boxes, seed, dtype=torch.float64):
    """Corners in order, sides of at least 0.02."""
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(num_boxes, 2, generator=g, dtype=dtype) * 0.6
    size = 0.02 + torch.rand(num_boxes, 2, generator=g, dtype=dtype) * 0.35
    return torch.cat([low, low + size], 1)


# --- decode --------------------------------------------------------------------------------------------


def test_decode_modes_hand_worked():
    z = torch.tensor([[0.0, 0.0, 2.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0, 0.0]])
    p = z.softmax(-1)
    torch.testing.assert_close(expectation_decode(z), p @ torch.arange(5.0) / 4)
    assert expectation_decode(z, mode="hard").tolist() == [0.5, 0.0]
    assert expectation_decode(z, mode="st").tolist() == [0.5, 0.0]
    torch.testing.assert_close(
        expectation_decode(z, temperature=2.0), (z / 2).softmax(-1) @ torch.arange(5.0) / 4
    )


def test_straight_through_has_the_value_of_hard_and_the_gradient_of_exp():
    z = torch.randn(6, 1000, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(6, dtype=torch.float64)
    grads = {
        mode: torch.autograd.grad((expectation_decode(z, mode=mode) * upstream).sum(), z)[0]
        for mode in ("exp", "st")
    }
    assert torch.equal(grads["exp"], grads["st"])
    assert torch.equal(expectation_decode(z, mode="st"), expectation_decode(z, mode="hard"))
    assert not expectation_decode(z, mode="hard").requires_grad


@pytest.mark.parametrize("bin_", [0, 1, 500, 999])
def test_certain_logits_decode_to_bin_over_999(bin_):
    z = torch.full((1, 1000), -1e4)
    z[0, bin_] = 1e4
    for mode in ("exp", "st", "hard"):
        assert expectation_decode(z, mode=mode).item() == pytest.approx(bin_ / 999)


def test_decode_of_nothing_and_of_an_unknown_mode():
    assert expectation_decode(torch.zeros(0, 1000)).shape == (0,)
    with pytest.raises(ConfigError, match="exp, st, hard"):
        expectation_decode(torch.zeros(1, 1000), mode="soft")


# --- smooth L1 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_boxes", [0, 1, 13])
def test_smoothl1_equals_torch(num_boxes):
    pred, gt = torch.rand(num_boxes, 4, requires_grad=True), torch.rand(num_boxes, 4)
    ours = bbox_smoothl1(pred, gt)
    expected = F.smooth_l1_loss(pred, gt, beta=1.0, reduction="sum")
    torch.testing.assert_close(ours.sum, expected)
    assert ours.count == 4 * num_boxes
    torch.testing.assert_close(torch.autograd.grad(ours.sum, pred)[0], torch.autograd.grad(expected, pred)[0])


def test_smoothl1_keeps_raw_corners():
    """Swapped corners are an error to be learned away, not put in order first."""
    pred, gt = torch.tensor([[0.5, 0.5, 0.1, 0.1]]), torch.tensor([[0.1, 0.1, 0.5, 0.5]])
    assert bbox_smoothl1(pred, gt).sum.item() == pytest.approx(4 * 0.5 * 0.4**2)


# --- CIoU ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ciou_equals_torchvision_on_ordinary_boxes(dtype):
    pred, gt = ordinary_boxes(64, 0, dtype).requires_grad_(), ordinary_boxes(64, 1, dtype)
    ours = bbox_ciou(pred, gt)
    expected = complete_box_iou_loss(1000 * pred, 1000 * gt, reduction="sum")

    torch.testing.assert_close(ours.sum, expected)
    assert ours.count == 64
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum, pred)[0],
        torch.autograd.grad(expected, pred)[0],
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("shift", [0.0, 0.001, 0.02, 0.2])
def test_ciou_equals_torchvision_box_by_box(shift):
    """Sides of 0.05 and more, from the same box over overlapping ones to separate ones."""
    gt = ordinary_boxes(200, 3, torch.float32)
    gt[:, 2:] = torch.maximum(gt[:, 2:], gt[:, :2] + 0.05)
    pred = gt + shift * torch.randn(200, 4, generator=torch.Generator().manual_seed(4)).clamp(-1, 1) * 0.5
    pred = torch.cat([pred[:, :2], torch.maximum(pred[:, 2:], pred[:, :2] + 0.05)], 1).clamp(0, 1)
    ours = torch.stack([bbox_ciou(p[None], g[None]).sum for p, g in zip(pred, gt, strict=True)])
    expected = complete_box_iou_loss(1000 * pred.double(), 1000 * gt.double())
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", [0, 1e-9, 1e-7, 1e-6, 1 / 999, 0.05, 0.5, 1])
def test_ciou_of_equal_boxes_is_zero(dtype, side):
    """Whatever their size: one bin is a side of 1 / 999."""
    low = torch.tensor([[0.0, 0.0], [0.2, 0.7], [0.998, 0.001]], dtype=dtype) * (1 - side)
    wide, flat = torch.tensor([side, side], dtype=dtype), torch.tensor([side, 0.3 * side], dtype=dtype)
    boxes = torch.cat([torch.cat([low, low + size], 1) for size in (wide, flat)]).requires_grad_()
    losses = [bbox_ciou(box[None], box.detach()[None]).sum for box in boxes]
    assert max(loss.item() for loss in losses) < 1e-6
    assert min(loss.item() for loss in losses) > -1e-6
    (grad,) = torch.autograd.grad(sum(losses), boxes)
    assert torch.isfinite(grad).all()


def test_ciou_of_boxes_one_bin_apart_hand_worked():
    """Two boxes of one bin that share a side: IoU 0, centres 1 bin apart, diagonal^2 of 2 x 1 bins = 5."""
    pred, gt = torch.tensor([[10.0, 20, 11, 21]]) / 999, torch.tensor([[11.0, 20, 12, 21]]) / 999
    assert bbox_ciou(pred, gt).sum.item() == pytest.approx(1 + 1 / 5, abs=1e-5)


def test_ciou_hand_worked():
    """Two unit-aspect squares of side 0.2 whose corners touch: IoU 0, centres 0.2 apart in x and y, the
    enclosing square has side 0.4: 1 - 0 + 0.08 / 0.32."""
    pred, gt = torch.tensor([[0.0, 0.0, 0.2, 0.2]]), torch.tensor([[0.2, 0.2, 0.4, 0.4]])
    assert bbox_ciou(pred, gt).sum.item() == pytest.approx(1.25, rel=1e-5)


def test_ciou_gradcheck_where_alpha_is_constant():
    """alpha is a constant for the gradient, so compare on boxes of equal aspect (v = alpha = 0)."""
    gt = torch.tensor([[0.2, 0.3, 0.6, 0.5]], dtype=torch.float64)
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    shift = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, d: bbox_ciou(gt * s + d, gt).sum, (scale, shift))


@settings(max_examples=60, deadline=None)
@given(pred=st.tuples(unit, unit, unit, unit), gt=st.tuples(unit, unit, unit, unit))
def test_ciou_is_finite_and_blind_to_corner_order(pred, gt):
    """Any four numbers: degenerate, swapped, identical, at the border."""
    pred_B4 = torch.tensor([pred], requires_grad=True)
    loss = bbox_ciou(pred_B4, torch.tensor([gt])).sum
    loss.backward()

    assert -1e-6 <= loss.item() <= 3
    assert torch.isfinite(pred_B4.grad).all()
    swapped = torch.tensor([[pred[2], pred[3], pred[0], pred[1]]])
    torch.testing.assert_close(bbox_ciou(swapped, torch.tensor([gt])).sum, loss.detach())


@pytest.mark.parametrize(
    "pred",
    [
        [0.5, 0.5, 0.5, 0.5],  # a point
        [0.2, 0.5, 0.8, 0.5],  # a horizontal line
        [0.5, 0.2, 0.5, 0.8],  # a vertical line
        [0.8, 0.7, 0.2, 0.1],  # both corners swapped
        [-0.3, 0.2, 1.4, 0.9],  # outside the image
    ],
)
@pytest.mark.parametrize("gt", [[0.1, 0.2, 0.6, 0.9], [0.5, 0.5, 0.5, 0.5]])
def test_ciou_on_degenerate_boxes(pred, gt):
    pred_B4 = torch.tensor([pred], requires_grad=True)
    loss = bbox_ciou(pred_B4, torch.tensor([gt])).sum
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(pred_B4.grad).all()
    assert pred_B4.grad.abs().max() < 1e3


def test_ciou_of_no_boxes():
    pred = torch.zeros(0, 4, requires_grad=True)
    loss = bbox_ciou(pred, torch.zeros(0, 4))
    loss.sum.backward()
    assert (loss.sum.item(), loss.count.item(), loss.mean().item()) == (0, 0, 0)


# --- token cross-entropy -------------------------------------------------------------------------------


def test_cross_entropy_equals_a_float64_sum_over_rows():
    z = torch.randn(5, 37, requires_grad=True)
    targets, weights = torch.tensor([0, 36, 3, 3, 9]), torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0])
    rows = [-(row - row.logsumexp(0))[t] for row, t in zip(z.double(), targets, strict=True)]
    expected = sum(w * ce for w, ce in zip(weights.double(), rows, strict=True))

    ours = (weights * cross_entropy_rows(z, targets)).sum()

    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    ours_grad, expected_grad = (torch.autograd.grad(x, z, retain_graph=True)[0] for x in (ours, expected))
    torch.testing.assert_close(ours_grad, expected_grad, rtol=1e-5, atol=1e-6)
    assert ours_grad[2].abs().max() == 0


def test_cross_entropy_at_extreme_logits_and_without_rows():
    z = torch.full((1, 9), 1e4, requires_grad=True)
    assert cross_entropy_rows(z, torch.tensor([4])).item() == pytest.approx(2.1972246, rel=1e-6)  # log 9
    empty = torch.zeros(0, 9, requires_grad=True)
    ce_R = cross_entropy_rows(empty, torch.zeros(0, dtype=torch.int64))
    ce_R.sum().backward()
    assert ce_R.shape == (0,)
