"""Coordinate and box losses on a device in float32, against the same on the CPU in float64. About 10 s on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.gpu import Say, error
from torch import Tensor

from coordexp.losses import coord
from coordexp.losses.box import bbox_ciou, bbox_smoothl1, expectation_decode
from coordexp.losses.columns import CoordColumns
from coordexp.losses.sums import SumCount

pytestmark = pytest.mark.gpu

N, V, FIRST = 256, 3001, 1777
COLUMNS = CoordColumns(range(FIRST, FIRST + 1000))
SOFT = {"sigma": 2.0, "truncate": 8.0, "temperature": 1.3}


def boxes(logits_NV: Tensor, mode: str) -> Tensor:
    """Four rows a box, decoded."""
    return expectation_decode(COLUMNS.take(logits_NV), mode=mode).view(-1, 4)


def true_boxes(bins_N: Tensor, like: Tensor) -> Tensor:
    return bins_N.view(-1, 4).to(like) / 999


Loss = Callable[[Tensor, Tensor], SumCount]
LOSSES: dict[str, Loss] = {
    "coord_soft_ce": lambda z, g: coord.coord_soft_ce(COLUMNS.take(z), g, **SOFT),
    "coord_w1": lambda z, g: coord.coord_w1(COLUMNS.take(z), g, **SOFT),
    "coord_token_ce": lambda z, g: coord.coord_token_ce(COLUMNS.take(z), g),
    "coord_el1": lambda z, g: coord.coord_el1(COLUMNS.take(z), g, temperature=1.3),
    "coord_ehuber": lambda z, g: coord.coord_ehuber(COLUMNS.take(z), g, delta=0.05),
    "coord_entropy": lambda z, _: coord.coord_entropy(COLUMNS.take(z)),
    "coord_gate": lambda z, _: coord.coord_gate(z, COLUMNS),
    "text_gate": lambda z, _: coord.text_gate(z, COLUMNS),
    "bbox_smoothl1 of expectations": lambda z, g: bbox_smoothl1(boxes(z, "exp"), true_boxes(g, z)),
    "bbox_ciou of expectations": lambda z, g: bbox_ciou(boxes(z, "exp"), true_boxes(g, z)),
    "bbox_ciou straight through": lambda z, g: bbox_ciou(boxes(z, "st"), true_boxes(g, z)),
}


def some_rows() -> tuple[Tensor, Tensor]:
    """Logits [N, V] that float32 and bfloat16 hold alike, sharp and flat; bins of boxes, corners in order."""
    g = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(N, V, generator=g) * torch.linspace(0.5, 6.0, N).unsqueeze(1)
    corners = torch.randint(0, 1000, (N // 4, 2, 2), generator=g).sort(dim=1).values
    return logits_NV.bfloat16().float(), corners.flatten()


def value_and_gradient(loss: Loss, logits_NV: Tensor, bins_N: Tensor) -> tuple[float, float, Tensor]:
    leaf = logits_NV.detach().clone().requires_grad_()
    found = loss(leaf, bins_N)
    found.sum.backward()
    assert leaf.grad is not None
    return found.sum.item(), found.count.item(), leaf.grad


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradient_are_those_of_the_cpu(
    device: torch.device, name: str, exact_products: None, say: Say
):
    logits_NV, bins_N = some_rows()
    value, count, grad = value_and_gradient(LOSSES[name], logits_NV.to(device), bins_N.to(device))
    true_value, true_count, true_grad = value_and_gradient(LOSSES[name], logits_NV.double(), bins_N)
    off = abs(value - true_value) / abs(true_value), error(grad, true_grad)
    say(f"{name}, float32 / float64 on the CPU: value off by {off[0]:.1e}, gradient by {off[1]:.1e}")
    assert count == true_count
    assert off[0] < 1e-5
    assert off[1] < 1e-4


def test_monitors_are_those_of_the_cpu(device: torch.device, exact_products: None, say: Say):
    logits_NV, bins_N = some_rows()
    logits_NV[torch.arange(0, N, 2), FIRST + bins_N[::2]] += 8.0  # half of them know their bin
    found = coord.coord_monitors(logits_NV.to(device), bins_N.to(device), COLUMNS)
    expected = coord.coord_monitors(logits_NV.double(), bins_N, COLUMNS)
    assert found.keys() == expected.keys()
    off = {key: abs(found[key].item() - value.item()) / abs(value.item()) for key, value in expected.items()}
    worst = max(off, key=lambda key: off[key])
    say(f"{len(off)} monitors, float32 / float64 on the CPU: off by at most {off[worst]:.1e} ({worst})")
    assert off[worst] < 1e-4


def test_boxes_without_area_have_finite_gradients(device: torch.device, exact_products: None, say: Say):
    """Equal, swapped and flat boxes."""
    pairs = torch.tensor(
        [
            [[0.2, 0.2, 0.6, 0.7], [0.2, 0.2, 0.6, 0.7]],
            [[0.6, 0.7, 0.2, 0.2], [0.2, 0.2, 0.6, 0.7]],
            [[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]],
            [[0.3, 0.1, 0.3, 0.9], [0.4, 0.4, 0.5, 0.5]],
        ]
    )
    values = {}
    for where, dtype in ((device, torch.float32), (torch.device("cpu"), torch.float64)):
        pred_B4 = pairs[:, 0].to(where, dtype).requires_grad_()
        loss = bbox_ciou(pred_B4, pairs[:, 1].to(where, dtype))
        loss.sum.backward()
        assert pred_B4.grad is not None
        assert bool(pred_B4.grad.isfinite().all())
        values[dtype] = loss.sum.item()
    found, expected = values[torch.float32], values[torch.float64]
    say(f"CIoU of equal, swapped and flat boxes: {found:.6f}, {expected:.6f} on the CPU; gradients finite")
    assert found == pytest.approx(expected, abs=1e-5)
