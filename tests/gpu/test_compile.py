"""`torch.compile`: weights of a compiled model are pushed under the names and with the bits of the model inside.

That is all the project says of compiled models (`coordexp.rollout.weights.policy_model.unwrapped`); nothing says that a
training run with `torch_compile: true` works, and no check here claims it. About 40 s on a GPU, most of it compilation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.gpu import Say, error
from support.stage1_head import load, make_batch

from coordexp.models.tiny import build_tiny_model
from coordexp.rollout.weights.policy_model import bit_sum, unwrapped
from coordexp.rollout.weights.sync import policy_tensors

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def test_the_weights_of_a_compiled_model_are_those_of_the_model_inside(
    device: torch.device, exact_products: None, tmp_path: Path, say: Say
):
    build_tiny_model(tmp_path / "model", preset="nano")
    model: Any = load(tmp_path / "model").to(device).eval()
    batch = make_batch(tmp_path / "model")
    inputs = {name: value.to(device) for name, value in batch.inputs.items()}
    backend = "inductor" if device.type == "cuda" else "eager"
    compiled: Any = torch.compile(model, backend=backend)
    with torch.no_grad():
        off = error(compiled(**inputs).logits, model(**inputs).logits)
    expected = {name: bit_sum(tensor).item() for name, tensor in policy_tensors(model)}
    found = {name: bit_sum(tensor).item() for name, tensor in policy_tensors(unwrapped(compiled))}
    say(f"backend {backend}: logits off by {off:.1e}; {len(found)} tensors with equal names and bit sums")
    assert off < 1e-4
    assert any(name.startswith("_orig_mod.") for name in compiled.state_dict())
    assert unwrapped(compiled) is model
    assert found == expected
