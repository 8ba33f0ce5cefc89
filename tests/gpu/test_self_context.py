"""Two forwards of self-context under bfloat16 autocast, through both heads, against float64 on the CPU.

15 s on a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.gpu import Say, error
from support.stage1_head import ALL_TERMS, Batch, load, make_batch
from torch import Tensor

from coordexp.head.run import HeadResult, RowsHead, Supervised
from coordexp.losses.inputs import LossInputs, SupervisedRows
from coordexp.losses.stage1 import Stage1Terms, combine, stage1_terms
from coordexp.models.self_context import CoordSlots, SelfContext, run_self_context
from coordexp.models.tiny import build_tiny_model

pytestmark = pytest.mark.gpu

BETWEEN = "model.language_model.layers.0.mlp.up_proj.weight"


class Found(NamedTuple):
    losses: tuple[float, float]
    """Of the first forward and of the last."""
    grad_VH: Tensor
    """Of the embedding."""
    grad_mlp: Tensor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("self_context") / "model"
    build_tiny_model(path, preset="nano")
    return path


@pytest.fixture(scope="module")
def batch(folder: Path) -> Batch:
    return make_batch(folder)


def noisy(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """Weights that make distributions over the bins differ from slot to slot."""
    model = load(folder)
    g = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn(parameter.shape, generator=g)
    return model.to(device, dtype)


def run(
    folder: Path, batch: Batch, device: torch.device, dtype: torch.dtype, mode: str, autocast: bool
) -> Found:
    model, columns = noisy(folder, device, dtype), batch.columns
    inputs = {
        name: value.to(device, dtype if value.is_floating_point() else None)
        for name, value in batch.inputs.items()
    }
    rows = SupervisedRows(
        batch.rows.positions_R.to(device), batch.rows.targets_R.to(device), batch.rows.num_text,
        batch.rows.bins_N.to(device),
    )  # fmt: skip
    slots = CoordSlots(rows.positions_R[rows.num_text :] + 1, columns.index(device))
    head = RowsHead(mode, columns)

    def objective(found: LossInputs) -> tuple[Tensor, Stage1Terms]:
        terms = stage1_terms(found, ALL_TERMS)
        return combine(terms, float(rows.num_text), float(rows.num_coord)), terms.detach()

    def forward(iteration: int) -> tuple[Tensor, Tensor | None]:
        supervised = Supervised(rows, ALL_TERMS.needs(), objective)
        result: HeadResult[Stage1Terms] = head.run(
            model, model, inputs, supervised, slots.rows_N if iteration == 0 else None
        )
        assert result.loss is not None
        return result.loss, result.slot_logits_NK

    context = torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext()
    with context:
        first, last = run_self_context(model, slots, SelfContext(num_forwards=2), forward)
    last.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return Found((first.item(), last.item()), model.get_input_embeddings().weight.grad, grads[BETWEEN])


@pytest.fixture(scope="module")
def truth(folder: Path, batch: Batch) -> Found:
    return run(folder, batch, torch.device("cpu"), torch.float64, "plain", autocast=False)


def off(found: Found, truth: Found) -> tuple[float, float]:
    """Of the loss of the last forward in terms of what self-context changed; of the worse gradient."""
    changed = abs(truth.losses[1] - truth.losses[0])
    gradients = error(found.grad_VH, truth.grad_VH), error(found.grad_mlp, truth.grad_mlp)
    return abs(found.losses[1] - truth.losses[1]) / changed, max(gradients)


@pytest.mark.parametrize("mode", ["plain", "fused"])
def test_float32_is_float64(
    folder: Path, batch: Batch, truth: Found, device: torch.device, exact_products: None, mode: str, say: Say
):
    loss, gradient = off(run(folder, batch, device, torch.float32, mode, autocast=False), truth)
    say(
        f"{mode}, float32 / float64: change of the loss by self-context off by {loss:.1e}, gradients by {gradient:.1e}"
    )
    assert loss < 1e-3
    assert gradient < 1e-3


@pytest.mark.parametrize("mode", ["plain", "fused"])
def test_autocast_is_near_float64(
    folder: Path, batch: Batch, truth: Found, device: torch.device, mode: str, say: Say
):
    loss, gradient = off(run(folder, batch, device, torch.float32, mode, autocast=True), truth)
    say(
        f"{mode}, bfloat16 autocast / float64: change of the loss by self-context off by {loss:.1%}, gradients by "
        f"{gradient:.1%}"
    )
    assert loss < 0.25
    assert gradient < 0.15
