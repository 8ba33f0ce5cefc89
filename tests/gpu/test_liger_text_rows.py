"""liger-kernel's text rows inside the fused head, against the fused head without it.

Needs a CUDA device and `pip install liger-kernel`. Without a device the kernels also run, slowly, on a CPU in Triton's
interpreter: TRITON_INTERPRET=1 pytest tests/gpu/test_liger_text_rows.py
"""

from __future__ import annotations

import os

import pytest
import torch
from support.gpu import Say, error, needs
from torch import Tensor

from coordexp.head.fused import FusedHead
from coordexp.head.liger import OnPredicted, choose_kernel, liger_kernel
from coordexp.head.projection import HeadProjection
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import LossInputs, SupervisedRows
from coordexp.losses.stage1 import Stage1Terms, Stage1Weights, combine, stage1_terms

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cpu" and not INTERPRETED, reason="needs a CUDA device, or TRITON_INTERPRET=1"
    ),
]

R, H, V, K = (40, 64, 2003, 1000) if INTERPRETED else (1500, 512, 50_001, 1000)
COLUMNS = CoordColumns(range(V - K - 1, V - 1))
WEIGHTS = Stage1Weights(ce_weight=1.0, gate_weight=1.0)


@pytest.fixture(autouse=True)
def needs_liger():
    needs("liger-kernel")
    assert liger_kernel() is not None, "needs liger-kernel 0.8.5 or later"


def make_rows() -> SupervisedRows:
    g = torch.Generator().manual_seed(0)
    targets_R = torch.randint(0, V - K - 1, (R,), generator=g)
    coord = torch.rand(R, generator=g) < 0.3
    targets_R[coord] = V - K - 1 + torch.randint(0, K, (int(coord.sum()),), generator=g)
    return SupervisedRows.from_targets(targets_R.to(DEVICE), COLUMNS)


def make_head(dtype: torch.dtype, *, frozen: bool) -> HeadProjection:
    g = torch.Generator().manual_seed(1)
    hidden_RH, weight_VH = torch.randn(R, H, generator=g), torch.randn(V, H, generator=g) * H**-0.5
    return HeadProjection(
        hidden_RH.to(DEVICE, dtype).requires_grad_(), weight_VH.to(DEVICE, dtype).requires_grad_(not frozen)
    )


def objective(inputs: LossInputs) -> tuple[Tensor, Stage1Terms]:
    """Stage 1, and text rows in weights of their own beside it."""
    terms = stage1_terms(inputs, WEIGHTS)
    weights_R = (inputs.rows.targets_R[: inputs.rows.num_text] % 3) / 2
    loss = combine(terms, 6100.0, 470.0) + (weights_R * inputs.text_ce_R).sum() / 6100
    return loss, terms.detach()


def run(head: HeadProjection, rows: SupervisedRows, kernel):
    predicted: list[Tensor] = []
    fused = FusedHead(
        head, rows, COLUMNS, WEIGHTS.needs(), objective, chunk_rows=256, text_kernel=kernel,
        observe=OnPredicted(lambda predicted_R, _rows: predicted.append(predicted_R)),
    )  # fmt: skip
    loss = fused.loss()
    loss.backward()
    return loss.item(), head.hidden_RH.grad, head.weight_VH.grad, torch.cat(predicted)


@pytest.mark.parametrize("frozen", [False, True])
def test_float32_is_the_same(frozen: bool, say: Say):
    rows = make_rows()
    ours = run(make_head(torch.float32, frozen=frozen), rows, None)
    liger = run(make_head(torch.float32, frozen=frozen), rows, liger_kernel())
    assert liger[0] == pytest.approx(ours[0], rel=1e-5)
    assert torch.equal(liger[3], ours[3])
    tolerance = 1e-5 if DEVICE == "cpu" else 2e-3  # products in TF32 differ by their order
    off = [error(a, b) for a, b in zip(liger[1:3], ours[1:3], strict=True) if b is not None]
    say(
        f"liger's text rows / ours, float32: loss {liger[0]:.6f} and {ours[0]:.6f}, gradients off by {max(off):.1e}"
    )
    for found, expected in zip(liger[1:3], ours[1:3], strict=True):
        assert (found is None) == (expected is None)
        assert found is None or (found - expected).norm() <= tolerance * expected.norm()


def test_bfloat16_is_no_worse_than_ours(say: Say):
    rows = make_rows()
    truth = run(make_head(torch.float32, frozen=False), rows, None)
    ours, liger = (run(make_head(torch.bfloat16, frozen=False), rows, k) for k in (None, liger_kernel()))
    off = [error(run_[2], truth[2]) for run_ in (liger, ours)]
    say(
        f"liger's text rows, bfloat16 / float32: gradient of the weight off by {off[0]:.1e} (ours {off[1]:.1e})"
    )
    assert liger[0] == pytest.approx(truth[0], rel=1e-2)
    for found, reference, expected in zip(liger[1:3], ours[1:3], truth[1:3], strict=True):
        errors = [((grad.float() - expected).norm() / expected.norm()).item() for grad in (found, reference)]
        assert errors[0] <= 1.2 * errors[1] + 5e-3


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_it_is_chosen_on_cuda(say: Say):
    say("liger's text rows are chosen for a plain head in bfloat16")
    assert choose_kernel(make_head(torch.bfloat16, frozen=False), WEIGHTS.needs(), None) is liger_kernel()
