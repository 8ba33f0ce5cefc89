"""Stage 1 through the plain and the fused head on a nano Qwen3-VL with images: same loss, metrics, gradients.

Takes about 15 s, a third of it imports.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.errors import ConfigError, ContractError
from coordexp.losses import head as head_settings
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import SupervisedRows
from coordexp.losses.stage1 import Stage1Terms, Stage1Weights, combine, stage1_terms
from coordexp.losses.sums import add_up
from coordexp.models.head_call import head_computes
from coordexp.models.supervised_rows import output_head
from coordexp.models.tiny import build_tiny_model
from coordexp.trainers.base import accuracy
from coordexp.trainers.rows_head import RowsHead

ALL_TERMS = Stage1Weights(soft_ce_weight=0.5, w1_weight=2.0, ce_weight=0.25, gate_weight=1.5)
ABLATION = Stage1Weights(enabled=False)
CHUNK_ROWS = 32  # the least there is, so that the batch takes several chunks


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nano") / "model"
    build_tiny_model(path, preset="nano")
    return path


@pytest.fixture(autouse=True)
def small_chunks(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab_size = load(nano).config.text_config.vocab_size
    monkeypatch.setitem(head_settings.CHUNK_BYTES, "cpu", 4 * CHUNK_ROWS * vocab_size)


def load(path: Path, *, tied: bool = True) -> nn.Module:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(path).train()
    if not tied:
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone().mul_(1.1))
    return model


class Batch(NamedTuple):
    inputs: dict[str, Tensor]
    rows: SupervisedRows
    columns: CoordColumns


@pytest.fixture(scope="module")
def batch(nano: Path) -> Batch:
    """Two ragged samples: an image of 4 visual tokens, then text and boxes; all but the prompt supervised."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(nano)
    vocab = CoordVocab.from_tokenizer(tokenizer)
    image, start, end = (
        tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "vision_start", "vision_end")
    )
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(40, 400, (2, 70), generator=g)
    ids[:, 1:7] = torch.tensor([start, *[image] * 4, end])
    for first in range(12, 68, 8):
        ids[:, first : first + 4] = vocab.ids[0] + torch.randint(0, 1000, (2, 4), generator=g)
    attention_mask = torch.ones_like(ids)
    attention_mask[1, 60:] = 0
    labels = ids.masked_fill(attention_mask == 0, -100)
    labels[:, :10] = -100
    inputs = {
        "input_ids": ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": (ids == image).long(),
        "pixel_values": torch.randn(2 * 16, 3 * 2 * 8 * 8, generator=g),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }
    columns = CoordColumns(vocab.ids)
    return Batch(inputs, SupervisedRows.from_labels(labels, columns), columns)


class Step(NamedTuple):
    loss: float
    metrics: dict[str, float]
    grads: dict[str, Tensor]


def run_step(
    model: nn.Module, batch: Batch, mode: str, weights: Stage1Weights = ALL_TERMS, *, train: bool = True
) -> Step:
    """One forward and backward as the stage-1 trainer does them, and all it would log."""
    rows, hits = batch.rows, []

    def objective(inputs):
        terms = stage1_terms(inputs, weights)
        return combine(terms, 3.0 * rows.num_text, 2.0 * rows.num_coord), terms.detach()

    unwrapped = model.module if isinstance(model, DistributedDataParallel) else model
    with torch.set_grad_enabled(train):
        loss, parts = RowsHead(mode, batch.columns)(
            model,
            unwrapped,
            batch.inputs,
            rows,
            weights.needs(mass_monitor=True),
            objective,
            lambda logits_RV, piece: hits.append(accuracy(logits_RV, piece.targets_R)),
        )
    if train:
        loss.backward()
    metrics = Stage1Terms.merge(parts).metrics() | {"token_acc": add_up(hits)}
    return Step(
        loss.item(),
        {key: float(total / count) for key, (total, count) in metrics.items()},
        {name: p.grad.clone() for name, p in unwrapped.named_parameters() if p.grad is not None},
    )


def assert_same(found: Step, expected: Step, rel: float = 1e-5) -> None:
    assert found.loss == pytest.approx(expected.loss, rel=rel)
    assert found.metrics == pytest.approx(expected.metrics, rel=rel)
    assert found.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        assert (found.grads[name] - grad).norm() <= rel * grad.norm() + 1e-9, name


def checkpointed(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def with_lora(model: nn.Module, **settings) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **settings))
    model.enable_input_require_grads()
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
        forward = model.forward
        model.forward = torch.autocast("cpu", torch.bfloat16)(forward)  # as accelerate does
        steps[mode] = run_step(model, batch, mode)
        assert steps[mode].loss == pytest.approx(truth.loss, rel=1e-2)
    assert steps["fused"].loss == pytest.approx(steps["plain"].loss, rel=1e-4)
    # Monitors of both see the same bf16 logits, and neither takes expectations over bins in bf16.
    assert steps["fused"].metrics == pytest.approx(steps["plain"].metrics, rel=1e-3, abs=1e-3)

    def error(mode: str, name: str) -> float:
        return float((steps[mode].grads[name] - truth.grads[name]).norm() / truth.grads[name].norm())

    for name in truth.grads:
        assert error("fused", name) <= 1.1 * error("plain", name) + 5e-3, name


@pytest.fixture
def one_rank(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("find_unused", [False, True])
def test_under_ddp(nano: Path, batch: Batch, one_rank: None, find_unused: bool):
    plain = run_step(load(nano), batch, "plain")
    wrapped = DistributedDataParallel(load(nano), find_unused_parameters=find_unused)
    assert_same(run_step(wrapped, batch, "fused"), plain)
    wrapped.zero_grad()
    assert_same(run_step(wrapped, batch, "fused"), plain)  # the first backward reached every parameter


def test_fused_never_makes_the_logits(nano: Path, batch: Batch):
    """Largest tensor that reaches the autograd graph with V columns."""
    widest = 0
    vocab_size = load(nano).config.text_config.vocab_size

    def pack(tensor: Tensor) -> Tensor:
        nonlocal widest
        if tensor.ndim == 2 and tensor.shape[1] == vocab_size:
            widest = max(widest, tensor.shape[0])
        return tensor

    rows = {}
    for mode in ("plain", "fused"):
        widest = 0
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run_step(load(nano), batch, mode)
        rows[mode] = widest
    # [num_text, V] for the cross-entropy against nothing
    assert rows["plain"] >= batch.rows.num_text
    assert rows["fused"] == 0


@pytest.mark.parametrize(("limit_rows", "fused"), [(10, True), (10_000, False)])
def test_auto_takes_the_fused_head_for_large_logits(nano, batch, monkeypatch, limit_rows, fused):
    vocab_size = load(nano).config.text_config.vocab_size
    monkeypatch.setattr(head_settings, "PLAIN_BYTES", 4 * vocab_size * limit_rows)
    num_chunks = []
    rows = batch.rows
    _, parts = RowsHead("auto", batch.columns)(
        model := load(nano),
        model,
        batch.inputs,
        rows,
        ALL_TERMS.needs(),
        lambda inputs: (stage1_terms(inputs, ALL_TERMS).text.sum, None),
        lambda logits_RV, _piece: num_chunks.append(logits_RV.shape[0]),
    )
    assert (len(parts) > 1) is fused
    assert sum(num_chunks) == rows.num_rows
    assert max(num_chunks) <= (CHUNK_ROWS if fused else rows.num_rows)


def test_auto_falls_back_to_the_module_of_an_unusual_head(nano: Path, batch: Batch):
    settings = {"target_modules": ["lm_head"], "use_dora": True}
    plain, auto = (
        run_step(with_lora(load(nano, tied=False), **settings), batch, mode) for mode in ("plain", "auto")
    )
    assert_same(auto, plain)
    with pytest.raises(ConfigError, match=r"use custom\.head = plain"):
        run_step(with_lora(load(nano, tied=False), **settings), batch, "fused")


class TestHeadComputes:
    def test_every_part_of_the_head_that_owns_weights_is_being_called(self, nano: Path, batch: Batch):
        model = with_lora(load(nano, tied=False), target_modules=["lm_head"])
        head = output_head(model)
        inside: list[str] = []
        for name, part in head.named_modules():
            part.register_forward_pre_hook(lambda *_, name=name: inside.append(name))
            part.register_forward_hook(lambda *_, name=name: inside.remove(name))
        seen = []

        def body(_head: nn.Module, hidden_BTH: Tensor) -> Tensor:
            seen.extend(inside)
            return hidden_BTH.sum()

        with head_computes(model, body):
            result = model(**batch.inputs).logits
        assert set(seen) == {"", "base_layer", "lora_A.default", "lora_B.default"}
        assert inside == []
        assert result.shape == ()
        assert model(**batch.inputs).logits.shape[:2] == (2, 70)  # nothing of it is left

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
