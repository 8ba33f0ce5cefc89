"""A borrowed model comes back as it was; bit sums and fingerprints say when tensors differ."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from coordexp.rollout.weights.policy_model import (
    bit_sum,
    borrowed_for_generation,
    fingerprint,
    preserved_random_state,
    unwrapped,
)


def test_random_streams_continue_as_if_nothing_had_drawn():
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = [draw(), draw()]
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    first = draw()
    with preserved_random_state():
        torch.manual_seed(99), random.seed(99), np.random.seed(99)
        draw()
    assert [first, draw()] == expected


def test_training_flags_and_position_cache_come_back_module_by_module(policy):
    model = policy.model
    model.train()
    model.model.visual.eval()  # a frozen tower stays in evaluation mode while the rest trains
    flags = {name: module.training for name, module in model.named_modules()}
    model.model.rope_deltas = None
    with borrowed_for_generation(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        model.model.rope_deltas = torch.ones(1)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert len(set(flags.values())) == 2
    assert model.model.rope_deltas is None
    assert torch.is_grad_enabled()


def test_a_model_is_given_back_after_an_error(policy):
    with pytest.raises(RuntimeError, match="broken"), borrowed_for_generation(policy.model):
        raise RuntimeError("broken")
    assert policy.model.training


def test_unwrapping_data_parallel_and_compiled_models():
    model = nn.Linear(2, 2)
    assert unwrapped(model) is model
    assert unwrapped(nn.DataParallel(model)) is model
    assert unwrapped(torch.compile(model)) is model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_bit_sum_of_a_fused_matrix_is_that_of_its_parts_in_any_layout(dtype):
    parts = [torch.randn(n, 5, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (2, 3, 4)]
    fused = torch.cat(parts)
    total = int(sum(bit_sum(part) for part in parts))
    assert int(bit_sum(fused)) == total
    assert int(bit_sum(fused.T)) == total
    assert int(bit_sum(fused[torch.randperm(9)])) == total


@given(st.integers(0, 11), st.sampled_from([1e-7, 1.0, float("nan")]))
def test_bit_sum_sees_one_changed_element(index: int, change: float):
    tensor = torch.linspace(-1, 1, 12)
    changed = tensor.clone()
    changed[index] += change
    same_bits = torch.equal(tensor.view(torch.int32), changed.view(torch.int32))
    assert (int(bit_sum(tensor)) == int(bit_sum(changed))) == same_bits


def test_the_fingerprint_changes_with_an_optimizer_step_and_only_then():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(10)])
    for parameter in model[:5].parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = fingerprint(model)
    assert fingerprint(model) == before
    model(torch.randn(2, 4)).sum().backward()
    assert fingerprint(model) == before
    optimizer.step()
    assert fingerprint(model) != before
