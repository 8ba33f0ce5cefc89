"""Effective weights of plain, adapted and offset models, and what their checksums say."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.errors import ConfigError, RolloutError
from coordexp.models.coord_offset import TABLE, attach_coord_offset, fold_coord_offset, fold_rows
from coordexp.rollout.weights.sync import (
    Checksum,
    Differences,
    PushedWeights,
    differences,
    digest,
    has_own_head,
    policy_tensors,
    probe_columns,
    refuse_differences,
)

ATTENTION = ["q_proj", "v_proj"]


def randomised(model: Any) -> Any:
    """Adapters are zeros at first; give every trained tensor some weight."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=g) * 0.05)
    return model


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], *, exact: bool = True) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0 if exact else 1e-6, msg=name)


def test_a_plain_model_gives_its_state_with_the_tied_head_under_both_names(policy):
    found = dict(policy_tensors(policy.model))
    assert_same(found, policy.model.state_dict())
    assert found["lm_head.weight"].data_ptr() == found["model.language_model.embed_tokens.weight"].data_ptr()
    assert not has_own_head(policy.model)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ATTENTION},
        {"target_modules": ATTENTION, "use_dora": True},
        {"target_modules": ATTENTION, "use_rslora": True, "lora_bias": False},
        {"target_modules": [*ATTENTION, "qkv"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=["lora", "dora", "rslora", "modules_to_save"],
)
def test_adapters_are_merged_and_the_trained_model_keeps_every_bit(policy, config):
    model = randomised(get_peft_model(policy.model, LoraConfig(r=4, lora_alpha=8, **config)))
    before = bits(model)
    storage = {name: p.data_ptr() for name, p in model.named_parameters()}
    found = {name: tensor.clone() for name, tensor in policy_tensors(model)}
    assert_same(bits(model), before)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == storage
    assert not any(getattr(module, "merged", False) for module in model.modules())
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    assert_same(found, expected, exact="use_dora" not in config)
    assert has_own_head(model) == ("modules_to_save" in config)


@pytest.mark.parametrize("tie_head", [True, False])
@pytest.mark.parametrize("lora", [False, True])
def test_coordinate_offsets_are_folded_in(policy, tie_head: bool, lora: bool):
    ids = CoordVocab.from_tokenizer(policy.template.tokenizer).ids
    attach_coord_offset(policy.model, ids, tie_head=tie_head)
    randomised(policy.model)
    plain = copy.deepcopy(policy.model)
    fold_coord_offset(plain)
    expected = plain.state_dict()
    model = policy.model
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=ATTENTION))

    def fold(module: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        table = tensors.get(TABLE)
        if table is None:
            return tensors
        rest = {name: tensor for name, tensor in tensors.items() if name != TABLE}
        return {**rest, "weight": fold_rows(tensors["weight"], table, module.coord_ids_K)}

    assert_same(dict(policy_tensors(model, fold)), expected)
    assert has_own_head(model)


def test_a_quantised_weight_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"0\.weight is torch\.int8.*backend: hf"):
        list(policy_tensors(model))


def checksums(tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Checksum]:
    pushed = PushedWeights(iter(tensors.items()), dtype)
    assert [name for name, _ in pushed] == list(tensors)
    return pushed.checksums()


def test_checksums_are_those_of_the_dtype_that_is_served():
    tensor = torch.linspace(-1, 1, 20).reshape(4, 5)
    assert checksums({"a": tensor}, torch.bfloat16) == checksums({"a": tensor.bfloat16()}, torch.bfloat16)
    assert checksums({"a": tensor}) != checksums({"a": tensor.bfloat16()}, torch.bfloat16)


def test_probed_columns_are_spread_over_the_matrix():
    assert probe_columns(5) == [0, 1, 2, 3, 4]
    columns = probe_columns(160)
    assert columns == list(range(0, 160, 10))


def test_fused_parts_add_up_and_differences_are_named():
    q, k, norm = torch.randn(3, 20), torch.randn(2, 20), torch.randn(20)
    pushed = checksums({"q": q, "k": k, "norm": norm})
    held = checksums({"qk": torch.cat([q, k]), "norm": norm})
    names = {"q": "qk", "k": "qk", "norm": "norm"}
    assert differences(pushed, held, names) == Differences([], [], [])

    only_columns = {"qk": Checksum(None, held["qk"].probed), "norm": held["norm"]}  # a repacked matrix
    assert differences(pushed, only_columns, names) == Differences([], [], [])

    stale = k.clone()
    stale[1, 0] += 1e-6
    held = checksums({"qk": torch.cat([q, stale]), "norm": norm, "head": norm})
    assert differences(pushed, held, names) == Differences(["qk"], ["head"], [])
    assert differences(pushed, checksums({"norm": norm}), names).unknown == ["qk"]


def test_refused_differences_name_version_tensors_and_what_to_check():
    refuse_differences(Differences([], [], []), backend="vllm", version=1, checksum="c")
    with pytest.raises(RolloutError, match=r"version 7 .*1 tensors differ.*\(qk\).*tied embeddings"):
        refuse_differences(Differences(["qk"], [], []), backend="vllm", version=7, checksum="c")
    with pytest.raises(RolloutError, match=r"1 were not pushed at all \(lm_head\)"):
        refuse_differences(Differences([], ["lm_head"], []), backend="vllm", version=7, checksum="c")


def test_the_digest_names_the_weights_whatever_their_order():
    tensors = {"a": torch.ones(3), "b": torch.zeros(2)}
    assert digest(checksums(tensors)) == digest(checksums(dict(reversed(tensors.items()))))
    assert digest(checksums(tensors)) != digest(checksums({**tensors, "b": torch.ones(2)}))
