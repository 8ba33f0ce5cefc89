"""The head in all its forms on a device, against float64: loss, gradients, and the memory they take.

The same values, rounded to bfloat16, go into all of them. About 30 s on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from support.gpu import Say, error, needs
from torch import Tensor

from coordexp.head.liger import liger_kernel
from coordexp.head.projection import HeadProjection
from coordexp.head.run import apply_head
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import LossInputs, SupervisedRows
from coordexp.losses.stage1 import Stage1Terms, Stage1Weights, combine, stage1_terms

pytestmark = pytest.mark.gpu

NUM_BINS = 1000
WEIGHTS = Stage1Weights(ce_weight=1.0, gate_weight=1.0)
MODES = ("plain", "fused", "liger")


class Sizes(NamedTuple):
    rows: int
    hidden: int
    vocab: int
    chunk: int


SIZES = {"cuda": Sizes(2048, 1024, 64_003, 256), "cpu": Sizes(70, 16, 1303, 32)}


class Case(NamedTuple):
    rows: SupervisedRows
    hidden_RH: Tensor
    weight_VH: Tensor
    columns: CoordColumns
    chunk: int


class Result(NamedTuple):
    loss: float
    grad_hidden_RH: Tensor
    grad_weight_VH: Tensor

    def errors(self, truth: Result) -> tuple[float, float, float]:
        """Of the loss, and of both gradients."""
        return (
            abs(self.loss - truth.loss) / abs(truth.loss),
            error(self.grad_hidden_RH, truth.grad_hidden_RH),
            error(self.grad_weight_VH, truth.grad_weight_VH),
        )


@pytest.fixture(scope="module")
def case(device: torch.device) -> Case:
    """Rows of which 30 % are coordinates; hidden states and weight hold numbers of bfloat16."""
    size, g = SIZES[device.type], torch.Generator().manual_seed(0)
    columns = CoordColumns(range(size.vocab - NUM_BINS - 1, size.vocab - 1))
    targets_R = torch.randint(0, size.vocab - NUM_BINS - 1, (size.rows,), generator=g)
    coord_R = torch.rand(size.rows, generator=g) < 0.3
    targets_R[coord_R] = columns.ids[0] + torch.randint(0, NUM_BINS, (int(coord_R.sum()),), generator=g)
    hidden_RH = torch.randn(size.rows, size.hidden, generator=g)
    weight_VH = torch.randn(size.vocab, size.hidden, generator=g) * 2 * size.hidden**-0.5
    rows = SupervisedRows.from_targets(targets_R.to(device), columns)
    hidden_RH, weight_VH = (x.to(device, torch.bfloat16) for x in (hidden_RH, weight_VH))
    return Case(rows, hidden_RH[rows.positions_R], weight_VH, columns, size.chunk)


@pytest.fixture(scope="module")
def truth(case: Case) -> Result:
    """In float64, by autograd over whole logits."""
    return run(case, torch.float64, "plain")


def run(case: Case, dtype: torch.dtype, mode: str) -> Result:
    """A forward and backward; denominators as of a larger step."""
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in (case.hidden_RH, case.weight_VH)]

    def objective(inputs: LossInputs) -> tuple[Tensor, Stage1Terms]:
        terms = stage1_terms(inputs, WEIGHTS)
        return combine(terms, 3.0 * case.rows.num_text, 2.0 * case.rows.num_coord), terms.detach()

    loss, _ = apply_head(
        HeadProjection(*leaves), case.rows, case.columns, WEIGHTS.needs(), objective,
        mode="plain" if mode == "plain" else "fused", chunk_rows=case.chunk, liger=mode == "liger",
    )  # fmt: skip
    loss.backward()
    hidden_RH, weight_VH = leaves
    assert hidden_RH.grad is not None
    assert weight_VH.grad is not None
    return Result(loss.item(), hidden_RH.grad, weight_VH.grad)


def require(mode: str, device: torch.device) -> None:
    if mode == "liger":
        needs("liger-kernel")
        if device.type != "cuda":
            pytest.skip("needs a CUDA device")
        assert liger_kernel() is not None


@pytest.mark.parametrize("mode", MODES)
def test_float32_gives_the_loss_and_gradients_of_float64(
    case: Case, truth: Result, device: torch.device, mode: str, exact_products: None, say: Say
):
    require(mode, device)
    loss, hidden, weight = run(case, torch.float32, mode).errors(truth)
    say(f"{mode}, float32 / float64: loss off by {loss:.1e}, gradients by {hidden:.1e} and {weight:.1e}")
    assert loss < 1e-5
    assert max(hidden, weight) < 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_is_no_further_from_float64_than_autograd_is(
    case: Case, truth: Result, device: torch.device, mode: str, say: Say
):
    require(mode, device)
    found, usual = (run(case, torch.bfloat16, each).errors(truth) for each in (mode, "plain"))
    shown = [f"{x:.1e} (plain {y:.1e})" for x, y in zip(found, usual, strict=True)]
    say(f"{mode}, bfloat16 / float64: loss off by {shown[0]}, gradients by {shown[1]} and {shown[2]}")
    assert found[0] < 5e-3
    for ours, plain in zip(found[1:], usual[1:], strict=True):
        assert plain < 3e-2
        assert ours <= 1.2 * plain + 1e-3


@pytest.mark.parametrize("mode", MODES[1:])
def test_the_peak_is_a_chunk_and_not_all_logits(case: Case, cuda: torch.device, mode: str, say: Say):
    require(mode, cuda)
    used = {each: peak_growth(case, cuda, each) for each in ("plain", mode)}
    share = used[mode] / used["plain"]
    say(
        f"{mode}, bfloat16: peak over inputs and their gradients {used[mode] / 2**20:.0f} MiB, plain "
        f"{used['plain'] / 2**20:.0f} MiB (ratio {share:.2f})"
    )
    assert used["plain"] > case.rows.num_rows * case.weight_VH.shape[0] * 4
    # liger-kernel holds a gradient of the weight of its own, in float32
    assert used[mode] < used["plain"] / 2 + (4 * case.weight_VH.numel() if mode == "liger" else 0)


def peak_growth(case: Case, device: torch.device, mode: str) -> int:
    """Bytes beyond the leaves and their gradients."""
    run(case, torch.bfloat16, mode)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run(case, torch.bfloat16, mode)
    leaves = 2 * (case.hidden_RH.numel() + case.weight_VH.numel())
    return torch.cuda.max_memory_allocated(device) - before - 2 * leaves
