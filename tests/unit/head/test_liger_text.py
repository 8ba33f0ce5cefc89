"""Text rows through a kernel that takes them at once: the same loss and gradients as in chunks.

The kernel here is written from its contract with plain torch; tests/gpu runs liger-kernel's.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coordexp.head.fused import FusedHead
from coordexp.head.liger import OnPredicted, TextRowsResult, liger_kernel, liger_serves
from coordexp.head.projection import HeadProjection
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import LossInputs, LossNeeds, SupervisedRows
from coordexp.losses.stage1 import Stage1Terms, Stage1Weights, combine, stage1_terms

K, V, H, R = 40, 150, 24, 53
COLUMNS = CoordColumns(range(60, 60 + K))


def torch_kernel(
    hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, weights_R: Tensor | None, weight_grad: bool
) -> TextRowsResult:
    logits_RV = hidden_RH @ weight_VH.T
    ce_R = F.cross_entropy(logits_RV.float(), targets_R, reduction="none")
    if weights_R is None:
        return TextRowsResult(ce_R, logits_RV.argmax(-1), None, None)
    grad_RV = logits_RV.float().softmax(-1)
    grad_RV[torch.arange(targets_R.numel()), targets_R] -= 1
    grad_RV = (grad_RV * weights_R.unsqueeze(1)).to(hidden_RH.dtype)
    grad_weight_VH = grad_RV.T @ hidden_RH if weight_grad else None
    return TextRowsResult(ce_R, logits_RV.argmax(-1), grad_RV @ weight_VH, grad_weight_VH)


def make_rows(share_coord: float = 0.4) -> SupervisedRows:
    g = torch.Generator().manual_seed(0)
    targets_R = torch.randint(0, 60, (R,), generator=g)
    coord = torch.rand(R, generator=g) < share_coord
    targets_R[coord] = 60 + torch.randint(0, K, (int(coord.sum()),), generator=g)
    return SupervisedRows.from_targets(targets_R, COLUMNS)


def make_head(dtype: torch.dtype = torch.float32, *, frozen: bool = False) -> HeadProjection:
    g = torch.Generator().manual_seed(1)
    hidden_RH = torch.randn(R, H, generator=g).to(dtype).requires_grad_()
    return HeadProjection(hidden_RH, torch.randn(V, H, generator=g).to(dtype).requires_grad_(not frozen))


def by_stage1(inputs: LossInputs) -> tuple[Tensor, Stage1Terms]:
    terms = stage1_terms(inputs, Stage1Weights(ce_weight=1.0, gate_weight=1.0))
    return combine(terms, torch.tensor(6100.0), torch.tensor(47.0)), terms.detach()


def by_weighted_text(inputs: LossInputs) -> tuple[Tensor, Stage1Terms]:
    """Text rows in weights of their own, some 0, as stage 2 has them."""
    weights_R = (inputs.rows.targets_R[: inputs.rows.num_text] % 4) / 8
    loss, terms = by_stage1(inputs)
    return loss + (weights_R * inputs.text_ce_R).sum() / 61, terms


OBJECTIVES = {"stage 1": by_stage1, "weighted text": by_weighted_text}


def run(kernel, head: HeadProjection, rows: SupervisedRows, objective, observe=None):
    needs = Stage1Weights(ce_weight=1.0, gate_weight=1.0).needs()
    fused = FusedHead(
        head, rows, COLUMNS, needs, objective, chunk_rows=8, observe=observe, text_kernel=kernel
    )
    loss = fused.loss()
    if loss.requires_grad:
        (0.37 * loss).backward()
    grads = [getattr(head, field.name) for field in fields(head)]
    numbers = {k: v.mean().item() for k, v in Stage1Terms.merge(fused.terms).metrics().items()}
    return loss.item(), [None if t is None else t.grad for t in grads], numbers


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=list(OBJECTIVES))
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_same_as_in_chunks(objective, frozen, dtype, tolerance):
    rows = make_rows()
    expected, found = (
        run(kernel, make_head(dtype, frozen=frozen), rows, objective) for kernel in (None, torch_kernel)
    )
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[2] == pytest.approx(expected[2], rel=1e-5)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            assert ours.dtype == theirs.dtype == dtype
            assert (ours - theirs).float().norm() <= tolerance * theirs.float().norm()


def test_equal_weights_are_not_rounded_to_the_dtype_of_the_products():
    seen = []

    def kernel(*args):
        seen.append(args[3])
        return torch_kernel(*args)

    run(kernel, make_head(torch.bfloat16), make_rows(), by_stage1)
    assert torch.equal(seen[0], torch.ones_like(seen[0]))  # 1/6100 has no exact bfloat16


def test_evaluation_asks_for_no_gradient():
    seen = []

    def kernel(*args):
        seen.append(args[3:])
        return torch_kernel(*args)

    with torch.no_grad():
        loss, _, numbers = run(kernel, make_head(), make_rows(), by_stage1)
    assert seen == [(None, False)]
    expected = run(None, make_head(), make_rows(), by_stage1)
    assert loss == pytest.approx(expected[0], rel=1e-5)
    assert numbers == pytest.approx(expected[2], rel=1e-5)


def test_predictions_reach_the_observer_in_the_order_of_the_rows():
    rows, head = make_rows(), make_head()
    found: dict[str, list[Tensor]] = {"chunks": [], "kernel": []}
    for name, kernel in (("chunks", None), ("kernel", torch_kernel)):
        run(kernel, head, rows, by_stage1, OnPredicted(lambda p, piece, into=found[name]: into.append(p)))
    expected = (head.hidden_RH @ head.weight_VH.T).argmax(-1)
    assert torch.equal(torch.cat(found["chunks"]), expected)
    assert torch.equal(torch.cat(found["kernel"]), expected)
    assert len(found["kernel"][0]) == rows.num_text


@pytest.mark.parametrize("share_coord", [0.0, 1.0], ids=["text only", "coordinates only"])
def test_rows_of_one_kind(share_coord):
    expected, found = (run(k, make_head(), make_rows(share_coord), by_stage1) for k in (None, torch_kernel))
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for ours, theirs in zip(found[1][:2], expected[1][:2], strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


class TestSelection:
    NEEDS = LossNeeds(coord_odds=True)

    def head(self, **parts: Tensor) -> HeadProjection:
        return HeadProjection(torch.zeros(2, H), torch.zeros(V, H), **parts)

    def test_serves_a_plain_product_on_cuda(self):
        assert liger_serves(self.head(), self.NEEDS, None, "cuda")
        assert liger_serves(self.head(), self.NEEDS, OnPredicted(lambda p, rows: None), "cuda")
        bf16 = HeadProjection(torch.zeros(2, H).bfloat16(), torch.zeros(V, H).bfloat16())
        assert liger_serves(bf16, self.NEEDS, None, "cuda")

    @pytest.mark.parametrize(
        "parts",
        [
            {"bias_V": torch.zeros(V)},
            {"lora_Rr": torch.zeros(2, 3), "lora_weight_Vr": torch.zeros(V, 3)},
            {"coord_offset_KH": torch.zeros(K, H)},
        ],
        ids=["bias", "LoRA", "coord offset"],
    )
    def test_not_a_sum_of_products(self, parts):
        assert not liger_serves(self.head(**parts), self.NEEDS, None, "cuda")

    def test_not_where_logits_are_needed_or_elsewhere_than_on_cuda(self):
        assert not liger_serves(self.head(), LossNeeds(text_odds=True), None, "cuda")
        assert not liger_serves(self.head(), self.NEEDS, lambda logits, rows: None, "cuda")
        assert not liger_serves(self.head(), self.NEEDS, None, "cpu")
        float64 = HeadProjection(torch.zeros(2, H).double(), torch.zeros(V, H).double())
        assert not liger_serves(float64, self.NEEDS, None, "cuda")

    def test_an_older_liger_kernel_is_not_used(self, tmp_path, monkeypatch, caplog, request):
        ops = tmp_path / "liger_kernel" / "ops"
        ops.mkdir(parents=True)
        (ops.parent / "__init__.py").touch()
        (ops / "__init__.py").touch()
        (ops / "fused_linear_cross_entropy.py").write_text(
            "def fused_linear_cross_entropy_forward(_input, weight, target, reduction='mean'): ...\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        for name in ("liger_kernel", "liger_kernel.ops", "liger_kernel.ops.fused_linear_cross_entropy"):
            monkeypatch.delitem(sys.modules, name, raising=False)
            request.addfinalizer(partial(sys.modules.pop, name, None))  # other tests must not find this one
        liger_kernel.cache_clear()
        assert liger_kernel() is None
        assert (
            "its fused linear cross-entropy lacks compute_gradients, return_predicted_tokens" in caplog.text
        )
        liger_kernel.cache_clear()
