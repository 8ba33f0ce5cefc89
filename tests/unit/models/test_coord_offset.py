"""The coord-offset adapter on a nano Qwen3-VL against a plain model whose weights hold the sums.

Takes about 35 s, most of it imports and three fresh processes.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.stage1_head import Batch, load, with_lora
from torch import Tensor, nn

from coordexp.errors import ConfigError
from coordexp.models.coord_offset import (
    OFFSET_FILE,
    OffsetAdapter,
    attach_coord_offset,
    attach_saved_offset,
    coord_offset_of,
    fold_coord_offset,
    fold_module,
    fold_rows,
    read_coord_offset,
    restore_coord_offset,
    save_coord_offset,
)
from coordexp.models.merge_offset import merge_offset
from coordexp.rollout.weights.sync import policy_tensors

TYINGS = pytest.mark.parametrize(
    ("tied", "tie_head"),
    [(True, True), (True, False), (False, True), (False, False)],
    ids=["tied, one table", "tied, two tables", "untied, one table", "untied, two tables"],
)


def folded_state(model):
    """Weights of a copy of the model after `fold_coord_offset`."""
    plain = copy.deepcopy(model)
    fold_coord_offset(plain)
    return plain.state_dict()


def fill(offset: OffsetAdapter, scale: float = 0.05) -> None:
    g = torch.Generator().manual_seed(5)
    for table_KH in offset.tables.values():
        table_KH.data.copy_(scale * torch.randn(table_KH.shape, generator=g))


def with_offset(path: Path, batch: Batch, *, tied: bool, tie_head: bool) -> nn.Module:
    model = load(path, tied=tied).eval()
    fill(attach_coord_offset(model, batch.columns.ids, tie_head=tie_head))
    return model


def with_sums(path: Path, batch: Batch, *, tied: bool, tie_head: bool) -> nn.Module:
    """The reference: an untied plain model with the tables added to its rows by hand."""
    adapted = with_offset(path, batch, tied=tied, tie_head=tie_head)
    model = load(path, tied=tied).eval()
    embedding, head = model.get_input_embeddings(), model.lm_head
    head.weight = nn.Parameter(head.weight.detach().clone())
    start, stop = batch.columns.ids[0], batch.columns.ids[-1] + 1
    for module, table_KH in ((embedding, adapted.get_input_embeddings().coord_offset_KH),
                             (head, adapted.lm_head.coord_offset_KH)):  # fmt: skip
        module.weight.data[start:stop] += table_KH.data
    return model


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch.inputs, use_cache=False).logits


@TYINGS
def test_logits_and_gradients_are_those_of_the_summed_weights(nano, batch, tied, tie_head):
    adapted = with_offset(nano, batch, tied=tied, tie_head=tie_head)
    summed = with_sums(nano, batch, tied=tied, tie_head=tie_head)
    found, expected = (logits_of(model, batch) for model in (adapted, summed))
    assert (expected - logits_of(load(nano, tied=tied).eval(), batch)).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    probe = torch.randn(found.shape, generator=torch.Generator().manual_seed(9))
    (found * probe).mean().backward()
    (expected * probe).mean().backward()
    ids = list(batch.columns.ids)
    embed_KH, head_KH = summed.get_input_embeddings().weight.grad[ids], summed.lm_head.weight.grad[ids]
    wanted = [embed_KH + head_KH] if tie_head else [embed_KH, head_KH]
    for table_KH, grad_KH in zip(coord_offset_of(adapted).tables.values(), wanted, strict=True):
        assert (table_KH.grad - grad_KH).norm() <= 1e-5 * grad_KH.norm()


def test_a_fresh_adapter_changes_nothing(nano, batch):
    model = load(nano).eval()
    before = logits_of(model, batch)
    offset = attach_coord_offset(model, batch.columns.ids, tie_head=True)
    assert torch.equal(logits_of(model, batch), before)
    assert model.lm_head.weight is model.get_input_embeddings().weight is offset.embedding.weight
    assert {key: tuple(table.shape) for key, table in offset.tables.items()} == {"embed": (1000, 32)}


def test_greedy_generation_is_that_of_the_summed_weights(nano, batch):
    inputs = {
        key: value[:1] for key, value in batch.inputs.items() if key.startswith(("input", "atten", "mm"))
    }
    images = {
        "pixel_values": batch.inputs["pixel_values"][:16],
        "image_grid_thw": batch.inputs["image_grid_thw"][:1],
    }
    answers = [
        make(nano, batch, tied=True, tie_head=True).generate(
            **inputs, **images, max_new_tokens=12, do_sample=False
        )
        for make in (with_offset, with_sums)
    ]
    assert torch.equal(*answers)
    assert answers[0].shape[1] > inputs["input_ids"].shape[1] + 2


def test_bf16_embeddings_are_rounded_once(nano, batch):
    model = load(nano).bfloat16()
    offset = attach_coord_offset(model, batch.columns.ids, tie_head=True)
    fill(offset)
    assert offset.embedding.coord_offset_KH.dtype == torch.float32
    ids = torch.tensor([[batch.columns.ids[7], 45]])
    plain = load(nano).bfloat16().get_input_embeddings().weight[ids[0]]
    expected = plain.float() + torch.stack([offset.embedding.coord_offset_KH[7], torch.zeros(32)])
    assert torch.equal(offset.embedding(ids)[0], expected.bfloat16())
    folded = folded_state(model)["lm_head.weight"]
    assert torch.equal(folded[ids[0]], expected.bfloat16())


@TYINGS
def test_the_folded_weights_are_those_of_a_plain_model(nano, batch, tied, tie_head):
    adapted = with_offset(nano, batch, tied=tied, tie_head=tie_head)
    state = folded_state(adapted)
    plain = load(nano, tied=False).eval()
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    torch.testing.assert_close(logits_of(plain, batch), logits_of(adapted, batch), rtol=1e-5, atol=1e-5)
    for name, module in (
        ("model.language_model.embed_tokens", adapted.get_input_embeddings()),
        ("lm_head", adapted.lm_head),
    ):
        by_module = fold_module(module, dict(module.named_parameters()))
        assert by_module.keys() == {"weight"}
        assert torch.equal(by_module["weight"], state[f"{name}.weight"])
    embed, head = state["model.language_model.embed_tokens.weight"], state["lm_head.weight"]
    assert (embed.data_ptr() == head.data_ptr()) == (tied and tie_head)
    assert coord_offset_of(adapted).unties == (tied and not tie_head)


@pytest.mark.parametrize("tie_head", [True, False])
def test_weights_pushed_to_another_engine_are_the_folded_ones(nano, batch, tie_head):
    adapted = with_offset(nano, batch, tied=False, tie_head=tie_head)
    expected = folded_state(adapted)
    with_lora(adapted, target_modules=["q_proj", "lm_head"])
    lora = adapted.lm_head
    expected["lm_head.weight"] = expected["lm_head.weight"] + lora.get_delta_weight("default")
    found = dict(policy_tensors(adapted, fold_module))
    assert found.keys() == expected.keys()
    for name in (
        "model.language_model.embed_tokens.weight",
        "lm_head.weight",
        "model.language_model.norm.weight",
    ):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


def test_folding_adds_to_the_rows_of_the_coordinate_tokens_and_copies():
    ids_K, weight = torch.tensor([5, 3]), torch.arange(16.0).view(8, 2)
    table = torch.tensor([[0.5, 0.25], [1.0, 2.0]])
    expected = weight.clone()
    expected[5] += torch.tensor([0.5, 0.25])
    expected[3] += torch.tensor([1.0, 2.0])
    assert torch.equal(fold_rows(weight, table, ids_K), expected)
    assert torch.equal(weight, torch.arange(16.0).view(8, 2))


@pytest.mark.parametrize("tie_head", [True, False])
def test_checkpoint_round_trip(nano, batch, tmp_path, tie_head):
    adapted = with_offset(nano, batch, tied=True, tie_head=tie_head)
    adapted.save_pretrained(tmp_path)
    save_coord_offset(adapted, tmp_path)
    assert load_file(tmp_path / OFFSET_FILE).keys() == {"coord_ids", "embed"} | (
        set() if tie_head else {"head"}
    )
    again = load(tmp_path).eval()
    offset = attach_saved_offset(again, tmp_path)
    assert offset.tie_head == tie_head
    assert torch.equal(logits_of(again, batch), logits_of(adapted, batch))
    assert attach_saved_offset(load(nano), nano) is None


def test_saving_takes_gathered_tensors_by_name(nano, batch, tmp_path):
    adapted = with_offset(nano, batch, tied=True, tie_head=False)
    gathered = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    for table_KH in coord_offset_of(adapted).tables.values():
        table_KH.data = table_KH.data.new_zeros(0)  # as DeepSpeed ZeRO-3 leaves it on a rank
    save_coord_offset(adapted, tmp_path, gathered)
    assert torch.equal(read_coord_offset(tmp_path).tables["head"], gathered["lm_head.coord_offset_KH"])
    (tmp_path / OFFSET_FILE).unlink()
    save_coord_offset(adapted, tmp_path, {})
    assert not (tmp_path / OFFSET_FILE).exists()


def test_tables_that_do_not_fit_are_refused(nano, batch, tmp_path):
    save_coord_offset(with_offset(nano, batch, tied=True, tie_head=False), tmp_path)
    saved = read_coord_offset(tmp_path)
    one_table = attach_coord_offset(load(nano), batch.columns.ids, tie_head=True)
    with pytest.raises(ConfigError, match=r"set custom\.coord_offset\.tie_head"):
        restore_coord_offset(one_table, saved, source=tmp_path)
    other_ids = attach_coord_offset(load(nano), [i - 1 for i in batch.columns.ids], tie_head=False)
    with pytest.raises(ConfigError, match="other ids than the model's tokenizer"):
        restore_coord_offset(other_ids, saved, source=tmp_path)


def test_models_that_cannot_take_the_adapter_are_refused(nano, batch):
    adapted = with_offset(nano, batch, tied=True, tie_head=True)
    with pytest.raises(ConfigError, match=r"a OffsetEmbedding where a plain torch\.nn\.Embedding"):
        attach_coord_offset(adapted, batch.columns.ids, tie_head=True)
    copies = with_lora(adapted, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ConfigError, match="found 1 embeddings and 2 heads with offsets"):
        coord_offset_of(copies)
    dora = with_offset(nano, batch, tied=False, tie_head=True)
    with_lora(dora, target_modules=["q_proj", "lm_head"], use_dora=True)
    with pytest.raises(ConfigError, match="leave embed_tokens and lm_head out of target_modules"):
        coord_offset_of(dora)


FRESH = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    logits = model(**load_file(sys.argv[2]), use_cache=False).logits
tied = torch.tensor(model.lm_head.weight is model.get_input_embeddings().weight)
save_file({"logits": logits, "tied": tied}, sys.argv[3])
"""


@pytest.mark.parametrize(
    ("lora", "tie_head"),
    [(False, True), (False, False), (True, True)],
    ids=["one table", "two tables", "LoRA"],
)
def test_merged_checkpoint_has_the_same_logits_in_a_fresh_process(nano, batch, tmp_path, lora, tie_head):
    from safetensors.torch import save_file

    adapted = with_offset(nano, batch, tied=True, tie_head=tie_head)
    if lora:
        adapted = with_lora(adapted, target_modules=["q_proj", "o_proj"]).eval()
        adapted.peft_config["default"].base_model_name_or_path = str(nano)
    checkpoint, merged = tmp_path / "checkpoint", tmp_path / "merged"
    adapted.save_pretrained(checkpoint)
    save_coord_offset(adapted, checkpoint)
    if not lora:
        from transformers import AutoProcessor

        AutoProcessor.from_pretrained(nano).save_pretrained(checkpoint)
    with torch.no_grad():
        expected = logits_of(adapted, batch)
    assert merge_offset(checkpoint, merged) == (not tie_head)
    save_file(batch.inputs, tmp_path / "inputs")
    files = [str(path) for path in (merged, tmp_path / "inputs", tmp_path / "logits")]
    subprocess.run([sys.executable, "-c", FRESH, *files], check=True, capture_output=True, timeout=120)
    found = load_file(tmp_path / "logits")
    torch.testing.assert_close(found["logits"], expected, rtol=1e-5, atol=1e-5)
    assert bool(found["tied"]) == tie_head
    assert (merged / "tokenizer.json").is_file()


def test_nothing_to_merge_is_an_error(nano, tmp_path):
    with pytest.raises(ConfigError, match="without them there is nothing to merge"):
        merge_offset(nano, tmp_path / "out")
    assert not (tmp_path / "out").exists()
