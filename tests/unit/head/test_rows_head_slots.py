"""Unrolled self-context through the plain and the fused head on a nano Qwen3-VL: same losses and gradients.

Takes about 15 s, a third of it imports.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.stage1_head import ALL_TERMS, Batch, load, with_lora
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from coordexp.errors import ContractError
from coordexp.head import run as head_settings
from coordexp.head.run import HeadResult, RowsHead, Supervised
from coordexp.losses.inputs import LossInputs
from coordexp.losses.stage1 import Stage1Terms, combine, stage1_terms
from coordexp.models.coord_offset import attach_coord_offset
from coordexp.models.self_context import CoordSlots, SelfContext, run_self_context


@pytest.fixture(autouse=True)
def smallest_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head_settings.CHUNK_BYTES, "cpu", 0)


class Unrolled(NamedTuple):
    losses: list[float]
    grads: dict[str, Tensor]


def slots_of(batch: Batch) -> CoordSlots:
    """All coordinate tokens of the batch that have a row before them in it."""
    ids_K = torch.tensor(batch.columns.ids)
    positions = torch.isin(batch.inputs["input_ids"].flatten(), ids_K).nonzero().flatten()
    return CoordSlots(positions, ids_K)


def with_offset(model: nn.Module, batch: Batch, *, tie_head: bool) -> nn.Module:
    """The adapter with tables that are not zero, on frozen matrices."""
    g = torch.Generator().manual_seed(5)
    offset = attach_coord_offset(model, batch.columns.ids, tie_head=tie_head)
    for table_KH in offset.tables.values():
        table_KH.data.normal_(generator=g).mul_(0.05)
    offset.embedding.weight.requires_grad_(False)
    offset.head.weight.requires_grad_(False)
    return model


def unroll(model: nn.Module, batch: Batch, mode: str, settings: SelfContext) -> Unrolled:
    """Backward of an objective on the first and the last forward, weighted differently."""
    unwrapped = model.module if isinstance(model, DistributedDataParallel) else model
    head, slots, rows = RowsHead(mode, batch.columns), slots_of(batch), batch.rows

    def objective(inputs: LossInputs) -> tuple[Tensor, Stage1Terms]:
        terms = stage1_terms(inputs, ALL_TERMS)
        return combine(terms, 3.0 * rows.num_text, 2.0 * rows.num_coord), terms.detach()

    def forward(iteration: int) -> tuple[HeadResult[Stage1Terms], Tensor]:
        is_between = 0 < iteration < settings.num_forwards - 1
        supervised = None if is_between else Supervised(rows, ALL_TERMS.needs(), objective)
        result = head.run(model, unwrapped, batch.inputs, supervised, slots.rows_N)
        return result, result.slot_logits_NK

    results = run_self_context(unwrapped, slots, settings, forward)
    losses = [result.loss for result in results if result.loss is not None]
    (losses[0] + 2.0 * losses[1]).backward()
    grads = {name: p.grad for name, p in unwrapped.named_parameters() if p.grad is not None}
    return Unrolled([loss.item() for loss in losses], grads)


def assert_same(found: Unrolled, expected: Unrolled, rel: float = 1e-5) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=rel)
    assert found.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        assert (found.grads[name] - grad).norm() <= rel * grad.norm() + 1e-9, name


@pytest.mark.parametrize("embed_mode", ["soft", "st", "hard"])
@pytest.mark.parametrize(
    ("grad_mode", "num_forwards"), [("unroll", 2), ("em_detach", 2), ("unroll", 3), ("em_detach", 3)]
)
def test_fused_unroll_equals_plain(nano: Path, batch: Batch, embed_mode, grad_mode, num_forwards):
    settings = SelfContext(num_forwards, embed_mode, grad_mode, temperature=0.7)
    plain, fused = (unroll(load(nano), batch, mode, settings) for mode in ("plain", "fused"))
    assert plain.losses[0] != pytest.approx(plain.losses[1], rel=1e-4)
    assert_same(fused, plain)


def test_unroll_carries_gradients_that_em_detach_does_not(nano: Path, batch: Batch):
    unrolled, detached = (
        unroll(load(nano), batch, "fused", SelfContext(2, "soft", grad)) for grad in ("unroll", "em_detach")
    )
    assert unrolled.losses == pytest.approx(detached.losses, rel=1e-6)
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    difference = (unrolled.grads[name] - detached.grads[name]).norm()
    assert difference > 1e-4 * detached.grads[name].norm()


ADAPTED: dict[str, Callable[[Path, Batch], nn.Module]] = {
    "one offset table": lambda path, batch: with_offset(load(path), batch, tie_head=True),
    "two offset tables": lambda path, batch: with_offset(load(path), batch, tie_head=False),
    "two tables, untied": lambda path, batch: with_offset(load(path, tied=False), batch, tie_head=False),
    "offsets, LoRA on the head": lambda path, batch: trained_offsets(
        with_lora(
            with_offset(load(path, tied=False), batch, tie_head=True), target_modules=["q_proj", "lm_head"]
        )
    ),
}


def trained_offsets(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if name.endswith("coord_offset_KH"):
            parameter.requires_grad_(True)
    return model


@pytest.mark.parametrize("make", ADAPTED.values(), ids=list(ADAPTED))
def test_offsets_and_lora(nano: Path, batch: Batch, make: Callable[[Path, Batch], nn.Module]):
    plain, fused = (unroll(make(nano, batch), batch, mode, SelfContext(2)) for mode in ("plain", "fused"))
    assert any(name.endswith("coord_offset_KH") and grad.any() for name, grad in plain.grads.items())
    assert_same(fused, plain)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("find_unused", [False, True])
def test_under_ddp(nano: Path, batch: Batch, find_unused: bool):
    plain = unroll(load(nano), batch, "plain", SelfContext(2))
    wrapped = DistributedDataParallel(load(nano), find_unused_parameters=find_unused, broadcast_buffers=False)
    assert_same(unroll(wrapped, batch, "fused", SelfContext(2)), plain)


@pytest.mark.parametrize(("mode", "holds_weight"), [("plain", True), ("fused", False)])
def test_graph_of_slot_logits_holds_no_whole_weight(nano: Path, batch: Batch, mode: str, holds_weight: bool):
    model, slots = load(nano), slots_of(batch)
    weight = model.lm_head.weight.requires_grad_(False)
    seen = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = RowsHead(mode, batch.columns).run(model, model, batch.inputs, None, slots.rows_N)
    assert (result.loss, result.terms) == (None, [])
    assert result.slot_logits_NK.shape == (slots.positions_N.numel(), 1000)
    assert result.slot_logits_NK.requires_grad
    assert any(seen) == holds_weight


@pytest.mark.parametrize("mode", ["plain", "fused"])
def test_no_slots_in_the_batch(nano: Path, batch: Batch, mode: str):
    model = load(nano)
    result = RowsHead(mode, batch.columns).run(
        model, model, batch.inputs, None, torch.zeros(0, dtype=torch.int64)
    )
    assert result.slot_logits_NK.shape == (0, 1000)


def test_nothing_to_do_is_an_error(nano: Path, batch: Batch):
    model = load(nano)
    with pytest.raises(ContractError, match="neither an objective nor slot rows"):
        RowsHead("fused", batch.columns).run(model, model, batch.inputs, None)
