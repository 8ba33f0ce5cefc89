"""The sizing formulas: worked by hand on small figures, and against transformers' own classes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
spec = importlib.util.spec_from_file_location("tools_docs_sizing", ROOT / "tools/docs/sizing.py")
assert spec is not None
assert spec.loader is not None
sizing = sys.modules["tools_docs_sizing"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sizing)

SMALL = sizing.Model("small", 8, 2, 2, 16, True, 4, 1, 6, kv_heads=1, head_dim=4, vocab=10, deepstack=1)


@pytest.mark.parametrize("model", sizing.MODELS, ids=lambda model: model.name)
def test_parameters_are_those_of_the_classes_of_transformers(model):
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig(
        text_config={
            "vocab_size": model.vocab, "hidden_size": model.hidden, "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads, "head_dim": model.head_dim,
            "intermediate_size": model.mlp, "tie_word_embeddings": model.tied,
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
        },
        vision_config={
            "depth": model.vision_layers, "hidden_size": model.vision_hidden, "intermediate_size": model.vision_mlp,
            "num_heads": 16, "out_hidden_size": model.hidden, "patch_size": 16, "num_position_embeddings": 2304,
            "deepstack_visual_indexes": list(range(model.deepstack)),
        },
        tie_word_embeddings=model.tied,
    )  # fmt: skip
    with torch.device("meta"):
        built = Qwen3VLForConditionalGeneration(config)
    assert model.parameters == sum(parameter.numel() for parameter in built.parameters())
    assert model.vision == sum(parameter.numel() for parameter in built.model.visual.parameters())


def test_states_under_zero():
    # 1000 parameters: 2000 bytes of weights, 2000 of gradients, 12000 of Adam
    assert sizing.state_bytes(1000, gpus=1, zero=0) == 16000
    assert sizing.state_bytes(1000, gpus=4, zero=1) == 2000 + 2000 + 3000
    assert sizing.state_bytes(1000, gpus=4, zero=2) == 2000 + 500 + 3000
    assert sizing.state_bytes(1000, gpus=4, zero=3) == 500 + 500 + 3000


def test_lora_cache_and_logits():
    # h 8, q 8, k 4, m 16: q and o 16 each, k and v 12 each, three of the MLP 24 each
    assert sizing.lora_parameters(SMALL, 3) == 2 * 3 * (16 * 2 + 12 * 2 + 24 * 3)
    assert sizing.kv_bytes_of_token(SMALL) == 2 * 2 * 4 * 2
    assert sizing.kv_bytes_of_token(sizing.MODELS[2]) == 144 * 1024
    assert sizing.logit_bytes(5, 10) == 5 * 10 * 12


def test_activations():
    # a token: 18 * 8 + 10 * (8 + 4) + 2 * (16 + 8) + 8 * 16 = 144 + 120 + 48 + 128
    assert sizing.layer_activation_bytes(SMALL, 3) == 3 * 440
    assert sizing.activation_bytes(SMALL, 3, checkpointing=False) == 2 * 3 * 440
    assert sizing.activation_bytes(SMALL, 3, checkpointing=True) == 2 * 2 * 3 * 8 + 3 * 440


@pytest.mark.parametrize(
    ("size", "limit", "tokens"),
    [
        ((640, 480), 786_432, 20 * 15),
        ((64, 64), 4096, 4),
        ((4000, 3000), 16_777_216, 125 * 94),
        ((10, 10), 786_432, 1),
    ],
)
def test_visual_tokens(size, limit, tokens):
    assert sizing.visual_tokens(*size, limit) == tokens


def test_operations_of_a_sample():
    # 1 visual token (4 patches), 2 of prompt, 1 of answer: t = 4
    sample = sizing.Sample(1, 2, 1)
    layers = 2 * (2 * 8 * (16 + 8 + 48) * 4 + 2 * 8 * 16)  # products, causal attention
    head = 2 * 10 * 8
    vision = 2 * 4 * (16 + 12) * 4 + 4 * 4 * 16
    frozen = sizing.training_flops(SMALL, sample, checkpointing=True, train_vision=False)
    assert frozen == 4 * layers + 3 * head + vision
    assert sizing.training_flops(SMALL, sample, checkpointing=False, train_vision=True) == 3 * (
        layers + head + vision
    )


def test_seconds_of_answers():
    # weights 2 * (language + 80) bytes and 3 answers x 32 bytes x (6 + 4 / 2) tokens, read for each of 4 tokens
    language = 2 * (8 * 72 + 16 + 8) + 8
    seconds = sizing.decode_seconds(
        SMALL, answers=3, context=6, new_tokens=4, bandwidth=1000.0, efficiency=0.5
    )
    assert seconds == pytest.approx(4 * (2 * (language + 80) + 3 * 32 * 8) / 500)


def test_the_page_holds_the_tables():
    page = (ROOT / "runbooks/sizing.md").read_text()
    assert sizing.tables(sizing.Plan()) in page, "python tools/docs/sizing.py --write"
