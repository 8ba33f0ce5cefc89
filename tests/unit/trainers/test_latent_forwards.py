"""Teacher and student of a latent prefix on a 2-layer model with LoRA: what they give is what whole forwards give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coordexp.errors import ConfigError
from coordexp.losses.latent.terms import TeacherRows
from coordexp.trainers.latent.forwards import layer_outputs, run_rows, run_teacher, without_lora

POSITIONS = torch.tensor([3, 4, 9, 13, 14])
STATES = torch.tensor([4, 13])


@pytest.fixture(scope="module")
def model(nano_model: Path) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained(nano_model).double()
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False, lora_dropout=0.5)
    return get_peft_model(base, config).double()


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    ids = torch.randint(40, 400, (2, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def whole(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    with torch.no_grad():
        output = model(**inputs, use_cache=False, output_hidden_states=True)
    return output.logits.flatten(0, 1), output.hidden_states


@pytest.mark.parametrize("chunk_rows", [1, 2, 100])
def test_the_teacher_is_the_model_without_lora_in_chunks(
    model: Any, inputs: dict[str, Tensor], chunk_rows: int
):
    model.train()
    teacher, states = run_teacher(
        model, inputs, POSITIONS, top_k=7, temperature=2.0, chunk_rows=chunk_rows, layers=(0,), state_positions_r=STATES
    )  # fmt: skip
    assert model.training
    with without_lora(model.eval()):
        logits, hidden = whole(model, inputs)
    wanted = TeacherRows.of_logits(logits[POSITIONS], top_k=7, temperature=2.0)
    assert torch.equal(teacher.token_ids_Rk, wanted.token_ids_Rk)
    torch.testing.assert_close(teacher.log_probs_Rk, wanted.log_probs_Rk, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(teacher.log_rest_R, wanted.log_rest_R, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(states[0], hidden[1].flatten(0, 1)[STATES], rtol=1e-12, atol=1e-12)
    assert (whole(model, inputs)[0] - logits).abs().max() > 1e-3  # LoRA is back
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_student_gives_rows_and_states_with_their_gradients(
    model: Any, inputs: dict[str, Tensor], checkpointing: bool
):
    model.eval()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        for module in model.modules():  # as in training, but for the dropout of LoRA
            if isinstance(module, torch.nn.Dropout):
                module.eval()
    found = run_rows(model, model, inputs, POSITIONS, layers=(0, 1), state_positions_r=STATES)
    logits, _ = whole(model, inputs)
    torch.testing.assert_close(found.logits_RV, logits[POSITIONS], rtol=1e-12, atol=1e-12)
    weight = next(w for n, w in model.named_parameters() if "layers.0" in n and "o_proj.lora_B" in n)
    model.zero_grad()
    (found.states[0].square().sum() + found.states[1].sum() + found.logits_RV.sum()).backward()
    gradient = weight.grad.clone()
    model.gradient_checkpointing_disable()
    model.eval()
    model.zero_grad()
    output = model(**inputs, use_cache=False)
    with layer_outputs(model, (0, 1), STATES) as states:
        logits_BTV = model(**inputs, use_cache=False).logits
    assert output.logits.shape == logits_BTV.shape
    (states[0].square().sum() + states[1].sum() + logits_BTV.flatten(0, 1)[POSITIONS].sum()).backward()
    torch.testing.assert_close(gradient, weight.grad, rtol=1e-9, atol=1e-12)


def test_a_layer_that_is_not_there_is_refused(model: Any):
    with (
        pytest.raises(ConfigError, match=r"names layers \[1, 2\], and the language model has 2"),
        layer_outputs(model, (1, 2), STATES),
    ):
        pass
