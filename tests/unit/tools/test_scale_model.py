"""The scale model: formulas worked by hand on small figures, and parity with torch, transformers and real runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scale import memory, page, shapes, step, work
from scale.check import Compared, compared, compared_memory
from scale.fit import Measured, fitted, predicted_seconds
from scale.memory import fused_head_bytes, plain_head_bytes, state_bytes, step_memory
from scale.plan import Plan, lengths, predict, simulated
from scale.rates import SHEETS, Rates, gpu_rates, read_rates, write_rates
from scale.shapes import MODELS, ModelShape, Pass, causal_pairs
from scale.step import Rollouts, Run, step_time
from scale.trial import Outcome, Trial
from scale.work import Training, Work, backward_work, decode_work, forward_work

from coordexp.errors import ConfigError
from coordexp.head.run import CHUNK_BYTES
from coordexp.models.tiny import PRESETS, TinyModelSize, tiny_config
from coordexp.models.tiny_tokenizer import train_tiny_tokenizer

SMALL = ModelShape(
    "small", 8, 2, 2, 16, True, 4, 1, 6, kv_heads=1, head_dim=4, vocab=10, deepstack=1, patch=2
)
H100 = gpu_rates(SHEETS["H100"])


def built(
    size: TinyModelSize, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> tuple[Any, ModelShape]:
    from transformers import Qwen3VLForConditionalGeneration

    config = tiny_config(size, train_tiny_tokenizer())
    config._attn_implementation = attention
    model: Any = Qwen3VLForConditionalGeneration(config).to(dtype).train()
    return model, ModelShape.from_config("tiny", config.to_dict())


def asked(model: Any, rows: int, tokens: int, padding: int = 0) -> dict[str, torch.Tensor]:
    """Rows of one picture of 8 x 8 patches and text. padding: tokens of the first row."""
    image, size = model.config.image_token_id, model.config.vision_config.patch_size
    ids = torch.randint(40, 400, (rows, tokens))
    ids[:, 2:18] = image
    mask = torch.ones_like(ids)
    mask[0, tokens - padding :] = 0
    return {
        "input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == image).int(),
        "pixel_values": torch.randn(rows * 64, 6 * size**2, dtype=model.dtype),
        "image_grid_thw": torch.tensor([[1, 8, 8]] * rows),
    }  # fmt: skip


def kept_bytes(model: Any, inputs: dict[str, torch.Tensor]) -> int:
    """What autograd keeps of the layers, weights left out."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(**inputs, use_cache=False)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in weights)


@pytest.mark.parametrize("shape", MODELS.values(), ids=lambda shape: shape.name)
def test_parameters_are_those_of_the_classes_of_transformers(shape):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig(
        text_config={
            "vocab_size": shape.vocab, "hidden_size": shape.hidden, "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
            "intermediate_size": shape.mlp, "tie_word_embeddings": shape.tied,
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
        },
        vision_config={
            "depth": shape.vision_layers, "hidden_size": shape.vision_hidden, "intermediate_size": shape.vision_mlp,
            "num_heads": shape.vision_heads, "out_hidden_size": shape.hidden, "patch_size": 16,
            "num_position_embeddings": 2304, "deepstack_visual_indexes": list(range(shape.deepstack)),
        },
        tie_word_embeddings=shape.tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.vision == sum(parameter.numel() for parameter in model.model.visual.parameters())
    assert replace(ModelShape.from_config(shape.name, config.to_dict())) == shape


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_operations_are_those_that_torch_counts(kv_heads):
    from torch.utils.flop_counter import FlopCounterMode

    size = replace(PRESETS["nano"], text_layers=3, text_heads=4, text_kv_heads=kv_heads, vision_depth=2)
    model, shape = built(size, attention="eager")
    inputs = asked(model, 2, 50)
    with FlopCounterMode(display=False) as counter:
        logits = model(**inputs, use_cache=False).logits
        forward = counter.get_total_flops()
        logits.sum().backward()
    one = replace(
        Pass.padded((50, 50), 100, patches=64), pairs=2 * 50.0 * 50
    )  # eager attention leaves nothing out
    assert forward == shapes.forward_flops(shape, one)
    told = backward_work(shape, one, Training())
    attention = told.attention / work.FLASH_BACKWARD * 2  # eager keeps the scores
    assert counter.get_total_flops() - forward == told.products + attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_autograd_keeps_of_a_language_layer(dtype):
    width = dtype.itemsize
    found = {}
    for layers in (1, 2):
        size = replace(PRESETS["nano"], text_layers=layers, text_heads=4, text_kv_heads=2)
        model, shape = built(size, dtype)
        for padding in (0, 5):
            found[layers, padding] = kept_bytes(model, asked(model, 2, 40, padding))
    causal, masked = (found[2, padding] - found[1, padding] for padding in (0, 5))
    assert causal == shapes.layer_kept(shape, 80, width=width)
    assert masked == shapes.layer_kept(shape, 80, width=width, mask_row=40)


def test_what_autograd_keeps_of_a_vision_layer_and_of_a_whole_forward():
    found = {}
    for depth in (1, 2):
        model, shape = built(replace(PRESETS["nano"], vision_depth=depth))
        found[depth] = kept_bytes(model, asked(model, 2, 40))
    assert found[2] - found[1] == shapes.vision_layer_kept(shape, 128, width=4)
    one = Pass.padded((40, 40), 0, patches=64)
    whole = shapes.activation_bytes(shape, one, width=4, checkpointing=False, vision_trained=True)
    assert whole == pytest.approx(found[2], rel=0.05)  # positions and small things are left out


def test_kernels_of_a_layer_are_those_that_torch_dispatches():
    from torch.utils._python_dispatch import TorchDispatchMode

    views = {"view", "transpose", "t", "expand", "permute", "slice", "unsqueeze", "select", "split", "_unsafe_view",
             "detach", "squeeze", "unbind", "narrow", "alias", "as_strided", "split_with_sizes"}  # fmt: skip

    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.number += func.overloadpacket.__name__ not in views
            return func(*args, **(kwargs or {}))

    found = {}
    for layers in (1, 2):
        model, _ = built(replace(PRESETS["nano"], text_layers=layers))
        inputs = asked(model, 2, 40)
        with Count() as forward:
            hidden = model.model(**inputs, use_cache=False).last_hidden_state
        with Count() as backward:
            hidden.sum().backward()
        found[layers] = (forward.number, backward.number)
    told = tuple(two - one for two, one in zip(found[2], found[1], strict=True))
    assert told == pytest.approx(work.LAYER_LAUNCHES, rel=0.15)  # grouped keys take a few more


def test_states_under_zero():
    # 1000 parameters: 2000 bytes of weights, 2000 of gradients, 12000 of Adam
    assert state_bytes(1000, gpus=1, zero=0) == 16000
    assert state_bytes(1000, gpus=4, zero=1) == 2000 + 2000 + 3000
    assert state_bytes(1000, gpus=4, zero=2) == 2000 + 500 + 3000
    assert state_bytes(1000, gpus=4, zero=3) == 500 + 500 + 3000


def test_lora_and_cache():
    # h 8, q 8, k 4, m 16: q and o 16 each, k and v 12 each, three of the MLP 24 each
    assert SMALL.lora_parameters(3) == 2 * 3 * (16 * 2 + 12 * 2 + 24 * 3)
    assert SMALL.kv_bytes() == 2 * 2 * 4 * 2
    assert MODELS["8B"].kv_bytes() == 144 * 1024


def test_heads():
    # bfloat16: logits 2, log-softmax 4, gradients 4 + 2; float32: logits 4, log-softmax 4 of text rows, gradient 4
    assert plain_head_bytes(5, 10) == 5 * 10 * 12
    assert plain_head_bytes(5, 10, coord_rows=2, width=4) == 10 * (5 * 4 + 3 * 4 + 5 * 4)
    # 20 text rows in one chunk of 32 at least: logits, ten columns six times, hidden gradients, gradient of the head
    found = fused_head_bytes(SMALL, 25, coord_rows=5, width=4)
    assert found == 20 * 10 * 4 + 20 * 10 * 4 * 6 + 25 * 8 * 8 + 4 * 80
    assert memory.CHUNK_BYTES == CHUNK_BYTES


def test_a_causal_kernel_leaves_out_whole_blocks():
    assert causal_pairs(10, 1) == 55
    assert causal_pairs(10, 4) == 10 * 4 + 6 * 4 + 2 * 2
    assert causal_pairs(400, 512) == 400 * 400
    packed = Pass.packed((3, 5), 4)
    assert (packed.tokens, packed.pairs, packed.mask_row) == (8, 9 + 25, 0)
    assert Pass.packed((3, 5), 4, masked=True).pairs == 64
    padded = Pass.padded((3, 5), 4, patches=4)
    assert (padded.tokens, padded.pairs, padded.mask_row, padded.patch_pairs) == (10, 50, 5, 32)


def test_work_of_a_step_by_hand():
    one = Pass(tokens=4, pairs=10, rows=1)
    forward = forward_work(SMALL, one, Training())
    assert forward.products == 2 * (2 * 8 * (16 + 8 + 48) * 4) + 2 * 10 * 8
    assert forward.attention == 2 * 4 * 8 * 10
    assert forward.scores == 10
    backward = backward_work(SMALL, one, Training(checkpointing=True))
    layers = 2 * (2 * 8 * (16 + 8 + 48) * 4)
    assert backward.products == 3 * layers + 2 * 2 * 10 * 8
    assert backward.attention == pytest.approx(3.5 * 640)
    frozen = backward_work(SMALL, one, Training(lora_rank=1))  # inputs' gradients, and both of the adapter's
    assert frozen.products == layers + 2 * 10 * 8 + 4 * SMALL.lora_parameters(1) * 4


def test_seconds_of_work_and_of_a_token():
    rates = Rates(products=100, attention=10, traffic=1000, scores=5, update=1, launch_s=0.5)
    asked_for = Work(products=100, attention=20, traffic=500, scores=10, launches=8)
    assert asked_for.seconds(rates) == pytest.approx(1 + 2 + 0.5 + 2 + 4)
    assert asked_for.seconds(replace(rates, device_beside_host=True)) == pytest.approx(5.5)  # launches hide
    language = 2 * (8 * 72 + 16 + 8) + 8
    token = decode_work(SMALL, 3, 8, width=2)
    assert token.traffic == 2 * (language + 80) + 3 * 8 * 32
    assert token.products == 3 * (2 * 2 * 8 * 72 + 2 * 80)


def test_parts_of_a_step_by_hand():
    rates = Rates(
        products=1e30, attention=1e30, traffic=1e30, scores=1e30, update=1e30, reduce=100.0, push=50.0, wake=25.0,
        decode_s=2.0, judge_token_s=0.5, sample_s=3.0, token_s=0.1, step_s=7.0,
    )  # fmt: skip
    told = Rollouts(questions=5, prompt=4, new_tokens=6, at_once=2, pushes=True, wakes=True)
    run = Run(SMALL, (Pass(4, 8, 1),), Training(), gpus=2, rollouts=told, samples=2, sample_tokens=10)
    found = step_time(run, rates)
    engine = 2 * SMALL.parameters
    assert found.load == pytest.approx(2 * (3 + 1))
    assert found.push == pytest.approx(engine / 50 + engine / 25)
    assert found.generate == pytest.approx(
        3 * 6 * 2.0 + 5 * (3 + 0.4)
    )  # three batches, each question encoded
    assert found.judge == pytest.approx(5 * 6 * 0.5)
    assert found.meet == pytest.approx(
        2 * SMALL.parameters * 4 / 2 / 100
    )  # all-reduce: twice half of the gradients
    assert found.update == pytest.approx(7)
    served = step_time(replace(run, rollouts=replace(told, waits=False, servers=1)), rates)
    assert served.generate == pytest.approx(
        5 * 6 * 2.0 + 10 * (3 + 0.4)
    )  # 10 questions, 2 at a time, on one GPU
    third = step_time(replace(run, zero=3), rates)
    assert third.meet == pytest.approx(3 * SMALL.parameters * 4 / 2 / 100)  # two gathers, one sum
    assert found.mixed(served, 0.25).generate == pytest.approx(0.75 * found.generate + 0.25 * served.generate)


def test_memory_of_a_step_by_hand():
    one, how = Pass(4, 8, 3, coord_rows=1), Training(vision_trained=False)
    found = step_memory(SMALL, [one], how, head="plain")
    assert found.weights == 4 * SMALL.parameters
    assert found.optimizer == 8 * (SMALL.parameters - SMALL.vision)
    kept = 2 * shapes.layer_kept(SMALL, 4, width=4) + 4 * 8 * 8
    at_loss = kept + 10 * (3 * 4 + 2 * 4 + 3 * 4)
    gradients = 4 * (SMALL.parameters - SMALL.vision)
    assert found.growth == max(at_loss, gradients)
    again = step_memory(SMALL, [one, one], how, head="plain")
    assert again.growth == at_loss + gradients  # the second begins with the first one's gradients


@settings(max_examples=40, deadline=None)
@given(
    model=st.sampled_from(list(MODELS)),
    gpus=st.sampled_from([2, 4, 8, 16]),
    length=st.integers(50, 2000),
    stage=st.sampled_from(["stage1", "rollouts"]),
)
def test_more_of_anything_takes_more_and_more_gpus_take_less(model, gpus, length, stage):
    plan = Plan(model=model, gpus=gpus, stage=stage, rollout_length=length)
    found, wider = predict(plan, H100), predict(replace(plan, gpus=2 * gpus), H100)
    assert wider.memory.optimizer < found.memory.optimizer
    assert wider.time.forward <= found.time.forward
    assert predict(replace(plan, checkpointing=False), H100).memory.peak >= found.memory.peak
    assert predict(replace(plan, zero=3), H100).peak <= found.peak
    assert predict(replace(plan, vision_trained=True), H100).time.total > found.time.total
    if stage == "rollouts":
        longer = predict(replace(plan, rollout_length=length + 500), H100)
        assert longer.time.generate > found.time.generate
        assert longer.engine > found.engine
        half = predict(replace(plan, b_ratio=0.5), H100)
        assert half.time.generate == pytest.approx(found.time.generate / 2)
        served = predict(replace(plan, engine="servers", servers=1), H100)
        assert served.engine == 0
        assert served.time.push < found.time.push


def test_packing_is_simulated_with_the_packer_of_the_trainers():
    drawn = lengths(100, 57, 2000)
    assert min(drawn) >= 107
    assert sum(drawn) / len(drawn) == pytest.approx(157, rel=0.05)
    small, large = simulated(100, 57, 400), simulated(100, 57, 8192)
    assert 0.9 < small.fill <= 1
    assert large.tokens == pytest.approx(large.fill * 8192)
    assert large.samples * 157 == pytest.approx(large.tokens, rel=0.1)
    assert simulated(100, 57, 250).samples < small.samples  # a shorter pack holds fewer


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(ConfigError, match="model '5B'"):
        Plan(model="5B")
    with pytest.raises(ConfigError, match="one left to train"):
        Plan(engine="servers", servers=8)
    with pytest.raises(ConfigError, match="only with engine servers"):
        Plan(servers=1)
    with pytest.raises(ConfigError, match="products is 0"):
        Rates(0, 1, 1, 1, 1)


def test_rates_survive_their_file(tmp_path: Path):
    write_rates(tmp_path / "rates.json", H100)
    assert read_rates(tmp_path / "rates.json") == H100
    (tmp_path / "rates.json").write_text('{"speed": 1}')
    with pytest.raises(ConfigError, match="expected an object with keys"):
        read_rates(tmp_path / "rates.json")
    assert set(H100.sources) >= {"products", "traffic", "push", "reduce"}


def measured(trial: Trial, rates: Rates) -> Measured:
    """A run on a machine of exactly these rates."""
    shape = ModelShape("tiny", 160 if "wide" not in trial.name else 320, 4, 5, 512, True, 128, 3, 256, kv_heads=5,
                       head_dim=32, vocab=1536, deepstack=1, vision_heads=4, patch=8, positions=64)  # fmt: skip
    tokens = 40 + 26 * trial.objects
    answers = [[37, trial.new_tokens]] * trial.batch if trial.has_rollouts else []
    told = {
        "channel": "B" if answers else None, "answers": answers,
        "forwards": [{
            "shape": [trial.batch, tokens], "samples": trial.batch, "text_rows": 20 * trial.objects * trial.batch,
            "coord_rows": 4 * trial.objects * trial.batch,
        }],
    }  # fmt: skip
    one = Measured(trial, shape, Outcome([told], 0, 0, 0))
    parts = predicted_seconds(one, rates)
    cpu_s = {
        "data": parts["load"], "forward": parts["forward"], "backward": parts["backward"],
        "optimizer": parts["update"] - rates.step_s, "other": parts["generate"] + rates.step_s,
    }  # fmt: skip
    return Measured(trial, shape, Outcome([{**told, "cpu_s": cpu_s}], 0, 0, 1))


def test_the_fit_finds_the_rates_that_made_the_times():
    from scale.fit import CALIBRATION

    true = Rates(
        products=5e10, attention=3e10, traffic=6e9, scores=1e8, update=1e10, launch_s=2e-5, decode_launch_s=1e-5,
        step_s=2e-3, sample_s=3e-3, token_s=1e-5,
    )  # fmt: skip
    found = fitted([measured(trial, true) for trial in CALIBRATION])
    for name in ("update", "sample_s", "token_s"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=0.02)
    other = measured(Trial("other", objects=7, batch=5), true)
    row = compared(replace_outcome(other, growth=10**8), found)[0]
    assert row.error == pytest.approx(0, abs=0.03)
    assert row.holds
    assert not Compared("x", "y", 1.3, 1.0, "s").holds


def replace_outcome(one: Measured, **changes: Any) -> Measured:
    return replace(one, outcome=replace(one.outcome, **changes))


def test_the_page_holds_the_tables():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.tables() in text, "python tools/scale_model.py table --write"
    rows = json.loads(page.CHECKED.read_text(encoding="utf-8"))["rows"]
    assert max(abs(row["error"]) for row in rows) <= 0.2


@pytest.mark.slow
def test_memory_of_a_real_run(tmp_path: Path):
    from scale.fit import measure

    one = measure(Trial("two layers", objects=2, batch=4, steps=1, size={"text_layers": 2}), tmp_path)
    assert abs(compared_memory(one).error) < 0.05
    assert one.outcome.weights == pytest.approx(4 * one.shape.parameters, rel=1e-4)
    assert one.outcome.optimizer == pytest.approx(8 * one.shape.parameters, rel=1e-4)
    assert step.step_time(one.run(), H100).generate == 0
