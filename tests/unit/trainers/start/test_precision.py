"""What a run is told about weights of 16 bits, from the parameters that its optimizer has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.stage1_head import load, with_lora
from torch import nn
from torch.optim import AdamW

from coordexp.trainers.start.precision import keeps_master_copy, lost_updates, moving_share


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def step_of_adamw(dtype: torch.dtype, rate: float) -> float:
    """The share of a million weights of deviation 0.02, as Qwen's are, that one step of AdamW changes."""
    g = torch.Generator().manual_seed(0)
    weights = nn.Parameter((0.02 * torch.randn(1_000_000, generator=g)).to(dtype))
    before = weights.detach().clone()
    weights.grad = torch.randn(1_000_000, generator=g).to(dtype)
    AdamW([weights], lr=rate, weight_decay=0.01).step()
    return (weights != before).float().mean().item()


def test_the_share_of_weights_that_a_step_of_adamw_moves():
    """At 1e-5 one of seven bfloat16 weights moves; of float32 weights nearly all."""
    assert step_of_adamw(torch.bfloat16, 1e-5) == pytest.approx(0.153, abs=0.005)
    assert step_of_adamw(torch.bfloat16, 1e-4) == pytest.approx(0.878, abs=0.02)
    assert step_of_adamw(torch.float32, 1e-5) > 0.999
    g = torch.Generator().manual_seed(0)
    weights = (0.02 * torch.randn(1_000_000, generator=g)).bfloat16()
    assert moving_share(weights, 1e-5) == pytest.approx(step_of_adamw(torch.bfloat16, 1e-5), abs=0.005)
    assert moving_share(torch.empty(0, dtype=torch.bfloat16), 1e-5) == 0.0


def test_full_training_in_bf16_is_told_with_its_own_numbers(nano: Path):
    model = load(nano).bfloat16()
    number = sum(parameter.numel() for parameter in trained(model))
    sentence = lost_updates(model, AdamW(trained(model), lr=1e-5), None)
    assert sentence is not None
    assert f"{number:,} of {number:,} trained weights are bfloat16" in sentence
    share = moving_share(model.get_input_embeddings().weight, 1e-5)
    assert 0 < share < 0.5
    assert f"Of model.language_model.embed_tokens.weight, {share:.0%} would move" in sentence
    assert "in a step of 1e-05" in sentence
    assert lost_updates(load(nano), AdamW(trained(load(nano)), lr=1e-5), None) is None


def test_lora_on_a_bf16_model_trains_float32_but_trained_copies_do_not(nano: Path):
    """PEFT keeps adapters in float32; what modules_to_save trains has the model's dtype."""
    lora = with_lora(load(nano).bfloat16(), target_modules=["q_proj"])
    assert lost_updates(lora, AdamW(trained(lora), lr=1e-4), None) is None
    saved = with_lora(load(nano).bfloat16(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    head = saved.get_output_embeddings().modules_to_save["default"].weight
    sentence = lost_updates(saved, AdamW(trained(saved), lr=1e-4), None)
    assert sentence is not None
    assert sentence.startswith(f"{head.numel():,} of ")
    assert "lm_head.modules_to_save.default.weight" in sentence


@pytest.mark.parametrize(
    ("config", "keeps"),
    [
        ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, True),
        ({"zero_optimization": {"stage": 1}}, True),
        ({"bf16": {"enabled": True}}, True),
        ({"zero_optimization": {"stage": 0}, "bf16": {"enabled": False}}, False),
        ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, False),
        ({"zero_optimization": {"stage": 3}, "fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}, False),
    ],
)  # fmt: skip
def test_deepspeed_counts_where_it_keeps_a_copy(nano: Path, config: dict, keeps: bool):
    assert keeps_master_copy(config) is keeps
    model = load(nano).bfloat16()
    assert (lost_updates(model, AdamW(trained(model), lr=1e-5), config) is None) is keeps
