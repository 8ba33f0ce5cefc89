"""Stage 1 through the plain and the fused head on a nano Qwen3-VL with images: same loss, metrics, gradients.

Takes about 15 s, a third of it imports.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.stage1_head import ALL_TERMS, Batch, forward, load, with_lora
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from coordexp.errors import ConfigError, ContractError
from coordexp.head import run as head_settings
from coordexp.head.call import head_computes
from coordexp.head.run import RowsHead
from coordexp.losses.inputs import SupervisedRows
from coordexp.losses.stage1 import Stage1Weights, stage1_terms

ABLATION = Stage1Weights(enabled=False)
CHUNK_ROWS = 32  # the least there is, so that the batch takes several chunks


@pytest.fixture(scope="module")
def vocab_size(nano: Path) -> int:
    return load(nano).config.text_config.vocab_size


@pytest.fixture(autouse=True)
def small_chunks(vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head_settings.CHUNK_BYTES, "cpu", 4 * CHUNK_ROWS * vocab_size)


class Step(NamedTuple):
    loss: float
    metrics: dict[str, float]
    grads: dict[str, Tensor]


def run_step(
    model: nn.Module, batch: Batch, mode: str, weights: Stage1Weights = ALL_TERMS, *, train: bool = True
) -> Step:
    """One forward, and in training its backward."""
    unwrapped = model.module if isinstance(model, DistributedDataParallel) else model
    with torch.set_grad_enabled(train):
        loss, metrics = forward(model, unwrapped, batch, mode, weights)
    if train:
        loss.backward()
    grads = {name: p.grad.clone() for name, p in unwrapped.named_parameters() if p.grad is not None}
    return Step(loss.item(), metrics, grads)


def assert_same(found: Step, expected: Step, rel: float = 1e-5) -> None:
    assert found.loss == pytest.approx(expected.loss, rel=rel)
    assert found.metrics == pytest.approx(expected.metrics, rel=rel)
    assert found.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        assert (found.grads[name] - grad).norm() <= rel * grad.norm() + 1e-9, name


def checkpointed(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


MODELS: dict[str, Callable[[Path], nn.Module]] = {
    "tied": load,
    "untied": lambda path: load(path, tied=False),
    "gradient checkpointing": lambda path: checkpointed(load(path)),
    "LoRA on the head": lambda path: with_lora(load(path, tied=False), target_modules=["q_proj", "lm_head"]),
    "LoRA, checkpointing": lambda path: checkpointed(
        with_lora(load(path, tied=False), target_modules=["v_proj", "lm_head"])
    ),
    "trained copy of the head": lambda path: with_lora(
        load(path, tied=False), target_modules=["q_proj"], modules_to_save=["lm_head"]
    ),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
def test_fused_head_equals_plain(nano: Path, batch: Batch, make: Callable[[Path], nn.Module]):
    plain, fused = (run_step(make(nano), batch, mode) for mode in ("plain", "fused"))
    assert any("visual" in name or "lora" in name for name in plain.grads)
    assert {"coord_diag/gate", "coord_diag/expected_bin_abs_err_p90", "base_ce/loss"} <= plain.metrics.keys()
    assert_same(fused, plain)


def test_pure_ce_ablation_and_evaluation(nano: Path, batch: Batch):
    model = load(nano)
    plain, fused = (run_step(model, batch, mode, ABLATION, train=False) for mode in ("plain", "fused"))
    assert not plain.grads
    assert not fused.grads
    assert_same(fused, plain)
    assert_same(
        run_step(load(nano), batch, "fused", ABLATION), run_step(load(nano), batch, "plain", ABLATION)
    )


def test_batch_without_supervision_keeps_every_gradient(nano: Path, batch: Batch):
    nothing = SupervisedRows.from_targets(torch.full((140,), -100), batch.columns)
    step = run_step(load(nano), batch._replace(rows=nothing), "fused")
    assert step.loss == 0.0
    assert step.grads.keys() == run_step(load(nano), batch, "plain").grads.keys()
    assert not any(grad.any() for grad in step.grads.values())


def test_autocast_bf16_is_no_worse_than_plain(nano: Path, batch: Batch):
    truth = run_step(load(nano), batch, "plain")
    steps = {}
    for mode in ("plain", "fused"):
        model = load(nano)
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)  # as accelerate does
        steps[mode] = run_step(model, batch, mode)
        assert steps[mode].loss == pytest.approx(truth.loss, rel=1e-2)
    # Both see the same bf16 logits, and neither takes expectations over bins in bf16.
    assert steps["fused"].loss == pytest.approx(steps["plain"].loss, rel=1e-4)
    assert steps["fused"].metrics == pytest.approx(steps["plain"].metrics, rel=1e-3, abs=1e-3)

    def error(mode: str, name: str) -> float:
        return float((steps[mode].grads[name] - truth.grads[name]).norm() / truth.grads[name].norm())

    for name in truth.grads:
        assert error("fused", name) <= 1.1 * error("plain", name) + 5e-3, name


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("find_unused", [False, True])
def test_under_ddp(nano: Path, batch: Batch, find_unused: bool):
    plain = run_step(load(nano), batch, "plain")
    wrapped = DistributedDataParallel(load(nano), find_unused_parameters=find_unused)
    assert_same(run_step(wrapped, batch, "fused"), plain)
    wrapped.zero_grad()
    assert_same(run_step(wrapped, batch, "fused"), plain)  # the first backward reached every parameter


def test_fused_keeps_no_logits_for_the_backward(nano: Path, batch: Batch, vocab_size: int):
    def rows_kept(mode: str) -> int:
        """Most rows of a [rows, V] tensor that autograd saves."""
        most = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal most
            if tensor.ndim == 2 and tensor.shape[1] == vocab_size:
                most = max(most, tensor.shape[0])
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run_step(load(nano), batch, mode)
        return most

    assert rows_kept("plain") >= batch.rows.num_text
    assert rows_kept("fused") == 0


@pytest.mark.parametrize(("limit_rows", "fused"), [(10, True), (10_000, False)])
def test_auto_takes_the_fused_head_for_large_logits(nano, batch, vocab_size, monkeypatch, limit_rows, fused):
    monkeypatch.setattr(head_settings, "PLAIN_BYTES", 4 * vocab_size * limit_rows)
    model, chunks = load(nano), []
    _, parts = RowsHead("auto", batch.columns)(
        model,
        model,
        batch.inputs,
        batch.rows,
        ALL_TERMS.needs(),
        lambda inputs: (stage1_terms(inputs, ALL_TERMS).text.sum, None),
        lambda logits_RV, _piece: chunks.append(logits_RV.shape[0]),
    )
    assert len(parts) == len(chunks)
    assert sum(chunks) == batch.rows.num_rows
    assert max(chunks) == (CHUNK_ROWS if fused else batch.rows.num_rows)


def test_auto_falls_back_to_the_module_of_an_unusual_head(nano: Path, batch: Batch):
    settings = {"target_modules": ["lm_head"], "use_dora": True}
    plain, auto = (
        run_step(with_lora(load(nano, tied=False), **settings), batch, mode) for mode in ("plain", "auto")
    )
    assert_same(auto, plain)
    with pytest.raises(ConfigError, match=r"use custom\.head = plain"):
        run_step(with_lora(load(nano, tied=False), **settings), batch, "fused")


class TestHeadComputes:
    def test_the_head_is_being_called_meanwhile(self, nano: Path, batch: Batch):
        model = load(nano)
        events = []
        model.lm_head.register_forward_pre_hook(lambda *_: events.append("before"))
        model.lm_head.register_forward_hook(lambda *_: events.append("after"))

        def body(head: nn.Module, hidden_BTH: Tensor) -> Tensor:
            events.append(head is model.lm_head)
            return hidden_BTH.sum()

        with head_computes(model, body):
            result = model(**batch.inputs).logits
        assert events == ["before", True, "after"]
        assert result.shape == ()

    def test_failure_inside_leaves_the_model_as_it_was(self, nano: Path, batch: Batch):
        model = load(nano)
        before = dict(vars(model.lm_head))

        def body(_head: nn.Module, _hidden: Tensor) -> Tensor:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError), head_computes(model, body):
            model(**batch.inputs)
        assert vars(model.lm_head) == before

    def test_earlier_override_of_the_forward_comes_back(self, nano: Path, batch: Batch):
        model = load(nano)
        override = model.lm_head.forward
        model.lm_head.forward = override
        with head_computes(model, lambda _head, hidden: hidden):
            model(**batch.inputs)
        assert vars(model.lm_head)["forward"] is override

    def test_a_forward_that_never_calls_the_head_is_an_error(self, nano: Path, batch: Batch):
        model = load(nano)
        with (
            pytest.raises(ContractError, match="did not call its head"),
            head_computes(model, lambda _h, x: x),
        ):
            model.model(**batch.inputs)
        assert "forward" not in vars(model.lm_head)

    def test_only_the_first_forward_is_replaced(self, nano: Path, batch: Batch):
        model = load(nano)
        with head_computes(model, lambda _head, hidden_BTH: hidden_BTH):
            first, second = (model(**batch.inputs).logits.shape[-1] for _ in range(2))
        sizes = model.config.text_config
        assert (first, second) == (sizes.hidden_size, sizes.vocab_size)
