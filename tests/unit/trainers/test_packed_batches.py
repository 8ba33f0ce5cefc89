"""Packs as ms-swift's template collates them, against the same samples padded: rows, loss, gradients, metrics."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from support.stage1_head import Batch
from support.stage1_head import forward as stage1_forward
from swift.model import get_model_processor
from swift.template import get_template
from swift.template.templates.qwen import Qwen3VLTemplate
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.config import Prompt
from coordexp.data.batch_meta import BatchMeta
from coordexp.data.collator import with_meta
from coordexp.data.dataset import read_training_rows
from coordexp.data.shapes import PRESETS, generate_shapes, with_overrides
from coordexp.errors import ContractError
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import SupervisedRows
from coordexp.models.tiny import build_tiny_model
from coordexp.swift_bridge.template import register_coord_template
from coordexp.swift_bridge.trainer import SUPERVISION_KEYS
from coordexp.trainers.packing import check_template_packs


class Setup(NamedTuple):
    model: nn.Module
    template: Any
    columns: CoordColumns
    samples: list[dict[str, Any]]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """A nano model, and 5 scenes of 1 to 3 objects as ms-swift encodes them."""
    folder = tmp_path_factory.mktemp("packs")
    build_tiny_model(folder / "nano", preset="nano", seed=0)
    scenes = with_overrides(PRESETS["pixels"], {"max_objects": 3, "min_side": 10, "max_side": 30})
    generate_shapes(folder / "scenes", scenes, num_train=5, num_val=1, seed=3)
    register_coord_template()
    model, processor = get_model_processor(
        str(folder / "nano"), model_type="qwen3_vl", torch_dtype=torch.float32, attn_impl=request.param
    )
    template = get_template(processor)
    template.set_mode("train")
    template.model = model
    rows = read_training_rows(folder / "scenes" / "train.jsonl", Prompt(user="Detect."))
    samples = [template.encode(row, return_length=True) for row in rows]
    columns = CoordColumns(CoordVocab.from_tokenizer(template.tokenizer).ids)
    return Setup(model.train(), template, columns, samples)


@pytest.fixture
def packing(setup: Setup) -> Iterator[None]:
    """The template as ms-swift leaves it for a packed run."""
    setup.template.packing = setup.template.padding_free = True
    yield
    setup.template.packing = setup.template.padding_free = False


def collate(setup: Setup, features: list[Any]) -> dict[str, Any]:
    return with_meta(setup.template.data_collator, setup.columns)(copy.deepcopy(features))


def padded_and_packed(setup: Setup) -> tuple[dict[str, Any], dict[str, Any]]:
    """One padded batch of all samples, and two packs of them (as a micro-batch of two packs)."""
    padded = collate(setup, setup.samples)
    setup.template.packing = setup.template.padding_free = True
    packed = collate(setup, [setup.samples[:2], setup.samples[2:]])
    setup.template.packing = setup.template.padding_free = False
    return padded, packed


def forward(setup: Setup, batch: dict[str, Any]) -> tuple[float, dict[str, float], dict[str, Tensor]]:
    """Loss, metrics and gradients of the stage-1 objective, as the trainer takes them."""
    inputs = dict(batch)
    rows = BatchMeta.take(inputs).rows
    inputs = {key: value for key, value in inputs.items() if key not in SUPERVISION_KEYS}
    setup.model.zero_grad()
    loss, metrics = stage1_forward(setup.model, setup.model, Batch(inputs, rows, setup.columns), "plain")
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in setup.model.named_parameters() if p.grad is not None}
    return loss.item(), metrics, gradients


def row_contents(rows: SupervisedRows, batch: dict[str, Any]) -> list[tuple[int, int]]:
    """(token the row stands on, token it is taught) of every supervised row."""
    tokens = batch["input_ids"].flatten()[rows.positions_R]
    return list(zip(tokens.tolist(), rows.targets_R.tolist(), strict=True))


def test_a_pack_supervises_the_rows_of_its_samples_in_their_order(setup: Setup):
    padded, packed = padded_and_packed(setup)
    assert packed["input_ids"].shape == (1, sum(sample["length"] for sample in setup.samples))
    assert packed["position_ids"].shape[0] == 4
    rows = [BatchMeta.take(dict(batch)).rows for batch in (padded, packed)]
    assert row_contents(rows[1], packed) == row_contents(rows[0], padded)
    assert (rows[1].num_text, rows[1].num_coord) == (rows[0].num_text, rows[0].num_coord)
    assert rows[1].bins_N.equal(rows[0].bins_N)
    assert [BatchMeta.of(batch).num_samples for batch in (padded, packed)] == [5, 5]


def test_mrope_rows_of_a_pack_are_those_of_its_samples_alone(setup: Setup):
    _, packed = padded_and_packed(setup)
    alone = [collate(setup, [sample])["position_ids"] for sample in setup.samples]
    assert packed["position_ids"][1:].equal(torch.cat(alone, dim=-1))
    text = torch.cat([torch.arange(sample["length"]) for sample in setup.samples])
    assert packed["position_ids"][0, 0].equal(text)


def test_loss_metrics_and_gradients_are_those_of_the_padded_batch(setup: Setup):
    padded, packed = padded_and_packed(setup)
    loss, metrics, gradients = forward(setup, padded)
    packed_loss, packed_metrics, packed_gradients = forward(setup, packed)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert packed_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    assert packed_gradients.keys() == gradients.keys()
    scale = max(gradient.abs().max() for gradient in gradients.values())
    assert max((packed_gradients[name] - gradients[name]).abs().max() for name in gradients) <= 1e-5 * scale


@pytest.mark.usefixtures("packing")
def test_without_the_text_row_samples_would_see_each_other(setup: Setup):
    """Why the checks exist: the stock three rows change the loss, silently."""
    packed = collate(setup, [setup.samples])
    loss, _, _ = forward(setup, packed)
    contaminated, _, _ = forward(setup, packed | {"position_ids": packed["position_ids"][1:]})
    assert abs(contaminated - loss) > 1e-3


@pytest.mark.usefixtures("packing")
def test_padding_free_batches_count_their_samples(setup: Setup):
    setup.template.packing = False
    batch = collate(setup, setup.samples[:3])
    assert batch["input_ids"].shape[0] == 1
    assert BatchMeta.of(batch).num_samples == 3


def stock_collator(setup: Setup) -> Any:
    """The collator of ms-swift's own Qwen3-VL template, on the same samples."""
    return lambda features: Qwen3VLTemplate._data_collator(setup.template, [*itertools.chain(*features)])


@pytest.mark.usefixtures("packing")
def test_packs_with_three_rows_are_refused(setup: Setup):
    collate_stock = with_meta(stock_collator(setup), setup.columns)
    with pytest.raises(ContractError, match=r"a pack of 5 samples has position ids of shape \[3, 1, \d+\]"):
        collate_stock([copy.deepcopy(setup.samples)])


@pytest.mark.usefixtures("packing")
def test_a_pack_with_an_attention_mask_is_refused(setup: Setup):
    def with_mask(features: list[Any]) -> dict[str, Any]:
        batch = setup.template.data_collator(features)
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}

    with pytest.raises(ContractError, match="has an attention mask"):
        with_meta(with_mask, setup.columns)([copy.deepcopy(setup.samples)])


@pytest.mark.usefixtures("packing")
def test_a_pack_that_lost_a_boundary_is_refused(setup: Setup):
    def merged(features: list[Any]) -> dict[str, Any]:
        batch = setup.template.data_collator(features)
        batch["position_ids"][0] = torch.arange(batch["input_ids"].shape[1])
        return batch

    with pytest.raises(ContractError, match="begin 1 times; expected one beginning for each sample"):
        with_meta(merged, setup.columns)([copy.deepcopy(setup.samples)])


@pytest.mark.usefixtures("packing")
def test_a_pack_that_supervises_a_first_token_is_refused(setup: Setup):
    samples = copy.deepcopy(setup.samples)
    samples[1]["labels"][0] = samples[1]["input_ids"][0]
    with pytest.raises(ContractError, match="supervises the first token of a sample"):
        with_meta(setup.template.data_collator, setup.columns)([samples])


@pytest.mark.usefixtures("packing")
def test_the_model_itself_is_asked_whether_it_keeps_samples_apart(setup: Setup):
    check_template_packs(setup.model, setup.template, torch.device("cpu"))
    assert setup.model.training


@pytest.mark.usefixtures("packing")
def test_a_model_that_ignores_sample_boundaries_is_refused(setup: Setup):
    class IgnoresTextRow(nn.Module):
        def forward(self, position_ids: Tensor, **inputs: Any) -> Any:
            return setup.model(position_ids=position_ids[1:], **inputs)

    with pytest.raises(ContractError, match="does not keep packed samples apart"):
        check_template_packs(IgnoresTextRow(), setup.template, torch.device("cpu"))


def varlen_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_others: Any,
) -> tuple[Tensor, None]:
    """What flash attention computes: it reads cumulative lengths, never the mask or the position ids."""
    assert attention_mask is None
    num_tokens = query_BHTD.shape[2]
    ends = [0, num_tokens] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    pieces = [
        nn.functional.scaled_dot_product_attention(
            *(x[:, :, start:end] for x in (query_BHTD, key_BHTD, value_BHTD)),
            is_causal=module.is_causal,
            scale=scaling,
            enable_gqa=True,
        )
        for start, end in itertools.pairwise(ends)
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def test_attention_that_reads_cumulative_lengths_gives_the_same_loss(setup: Setup):
    AttentionInterface.register("varlen_reference", varlen_attention)
    AttentionMaskInterface.register("varlen_reference", flash_attention_mask)
    padded, packed = padded_and_packed(setup)
    loss, _, _ = forward(setup, padded)
    before = setup.model.config._attn_implementation
    setup.model.set_attn_implementation("varlen_reference")
    try:
        packed_loss, _, _ = forward(setup, packed)
        lengths = {key: value for key, value in packed.items() if "cu_seq_lens" not in key}
        contaminated, _, _ = forward(setup, lengths)
    finally:
        setup.model.set_attn_implementation(before)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert abs(contaminated - loss) > 1e-3
