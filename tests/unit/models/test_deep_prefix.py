"""Key/value vectors of every layer on a 2-layer Qwen3-VL with images: nothing at first, the same however it is run.

Takes about 12 s, most of it imports.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coordexp.errors import ConfigError, ContractError
from coordexp.models.latent_prefix.deep import (
    ATTENTION,
    DeepPrefix,
    DeepSettings,
    deep_in_place,
    read_deep,
)
from coordexp.models.latent_prefix.folder import (
    PREFIX_FILE,
    build_deep,
    build_prefix,
    load_weights,
    read_prefix,
    trained_state,
    write_prefix,
)
from coordexp.models.latent_prefix.place import latents_in_place
from coordexp.models.latent_prefix.prefix import LatentPrefix, PrefixSettings

D, LENGTH, SHORT = 3, 24, 19
SMALL = {"width": 16, "heads": 2, "layers": 1, "mlp_width": 24}


@pytest.fixture(scope="module")
def loaded(nano_model: Path) -> nn.Module:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(nano_model).double()


@pytest.fixture
def model(loaded: nn.Module) -> nn.Module:
    """One that has not been made ready."""
    config: Any = loaded.config
    config.text_config._attn_implementation = "sdpa"
    loaded.requires_grad_(False)
    loaded.gradient_checkpointing_disable()
    return loaded.eval()


@pytest.fixture(scope="module")
def settings(loaded: nn.Module) -> DeepSettings:
    config: Any = loaded.config
    return DeepSettings.of(D, config.text_config)


def fresh(settings: DeepSettings) -> DeepPrefix:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return DeepPrefix(settings).double()


@pytest.fixture
def trained(settings: DeepSettings) -> DeepPrefix:
    deep = fresh(settings)
    deep.values_LKDE.data = torch.randn(
        deep.values_LKDE.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )
    return deep


@pytest.fixture
def samples(model: nn.Module) -> list[dict[str, Tensor]]:
    """Two of different length, with a picture of 4 visual tokens each."""
    g = torch.Generator().manual_seed(1)
    config: Any = model.config
    found = []
    for length in (SHORT, LENGTH):
        ids = torch.randint(40, 400, (1, length), generator=g)
        picture = [config.vision_start_token_id, *[config.image_token_id] * 4, config.vision_end_token_id]
        ids[:, 2:8] = torch.tensor(picture)
        found.append(
            {
                "input_ids": ids,
                "mm_token_type_ids": (ids == config.image_token_id).long(),
                "pixel_values": torch.randn(16, 3 * 2 * 8 * 8, generator=g, dtype=torch.float64),
                "image_grid_thw": torch.tensor([[1, 4, 4]]),
            }
        )
    return found


def batched(samples: list[dict[str, Tensor]], side: str) -> dict[str, Tensor]:
    """Padded on the `left` or `right`."""
    number = LENGTH - SHORT
    padding = (number, 0) if side == "left" else (0, number)
    short, long = samples
    rows = {
        "input_ids": 7,
        "mm_token_type_ids": 0,
        "attention_mask": 0,
    }
    short, long = ({**one, "attention_mask": torch.ones_like(one["input_ids"])} for one in (short, long))
    return {
        name: torch.cat(
            [nn.functional.pad(short[name], padding, value=rows[name]) if name in rows else short[name], long[name]]
        )
        for name in short
    }  # fmt: skip


def logits(model: nn.Module, deep: DeepPrefix | None, **batch: Tensor) -> Tensor:
    with deep_in_place(model, deep):
        found: Tensor = model(**batch, use_cache=False).logits
    return found


def test_a_new_one_changes_no_logit_and_is_not_read_outside_its_context(
    model: nn.Module, samples: list[dict[str, Tensor]], settings: DeepSettings, trained: DeepPrefix
):
    batch = batched(samples, "right")
    before = model(**batch, use_cache=False).logits
    read_deep(model)
    assert torch.equal(model(**batch, use_cache=False).logits, before)
    assert torch.equal(logits(model, fresh(settings), **batch), before)
    assert (logits(model, trained, **batch) - before).abs().max() > 0.01
    assert torch.equal(model(**batch, use_cache=False).logits, before)


def test_every_layer_reads_its_own_vectors_by_a_softmax_of_their_own(
    model: nn.Module, samples: list[dict[str, Tensor]], trained: DeepPrefix
):
    """Against attention written out, from the queries that each layer really asks with."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb

    read_deep(model)
    layers: Any = [m for m in model.modules() if type(m).__name__ == "Qwen3VLTextAttention"]
    seen: list[tuple[Any, Tensor]] = []
    handles = [
        layer.register_forward_hook(
            lambda module, _args, kwargs, output: seen.append((module, kwargs, output[0])), with_kwargs=True
        )
        for layer in layers
    ]
    with deep_in_place(model, trained):
        model(**samples[1], use_cache=False)
    for handle in handles:
        handle.remove()
    assert len(seen) == trained.keys_LKDE.shape[0] == len(layers)
    for index, (module, kwargs, output) in enumerate(seen):
        given = {name: v for name, v in kwargs.items() if name != "deep_prefix"}
        plain = module(**given)[0]
        hidden = kwargs["hidden_states"]
        heads, head_dim = trained.keys_LKDE.shape[1], trained.keys_LKDE.shape[3]
        query = module.q_norm(module.q_proj(hidden).view(1, LENGTH, -1, head_dim)).transpose(1, 2)
        query, _ = apply_rotary_pos_emb(query, query, *kwargs["position_embeddings"])
        groups = query.shape[1] // heads
        assert groups > 1  # key/value heads are shared
        read = []
        for head in range(query.shape[1]):
            scores = query[0, head] @ trained.keys_LKDE[index, head // groups].T / head_dim**0.5
            read.append(scores.softmax(-1) @ trained.values_LKDE[index, head // groups])
        wanted = plain + module.o_proj(torch.cat(read, -1))
        torch.testing.assert_close(output, wanted, atol=1e-10, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_with_padding_gives_the_logits_of_each_sample(
    model: nn.Module, samples: list[dict[str, Tensor]], trained: DeepPrefix, side: str
):
    read_deep(model)
    together = logits(model, trained, **batched(samples, side))
    short = together[0, -SHORT:] if side == "left" else together[0, :SHORT]
    torch.testing.assert_close(short, logits(model, trained, **samples[0])[0], atol=1e-9, rtol=0)
    torch.testing.assert_close(together[1], logits(model, trained, **samples[1])[0], atol=1e-9, rtol=0)


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_writes_what_one_forward_expects(
    model: nn.Module, samples: list[dict[str, Tensor]], trained: DeepPrefix, beams: int
):
    """With images and padding; of beams, the scores of what they wrote are those of the forward."""
    read_deep(model)
    with deep_in_place(model, trained), torch.no_grad():
        made = model.generate(
            **batched(samples, "left"), max_new_tokens=6, do_sample=False, eos_token_id=None, num_beams=beams,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    for row, sample in enumerate(samples):
        length = sample["input_ids"].shape[1]
        whole = made.sequences[row : row + 1, LENGTH - length :]
        kinds = nn.functional.pad(sample["mm_token_type_ids"], (0, 6))
        given = {**sample, "input_ids": whole, "mm_token_type_ids": kinds}
        expected = logits(model, trained, **given)[0, -7:-1].log_softmax(-1)
        answer = whole[0, -6:]
        if beams == 1:
            assert expected.argmax(-1).tolist() == answer.tolist()
            assert logits(model, None, **given)[0, -7:-1].argmax(-1).tolist() != answer.tolist()
        else:
            summed = expected.gather(1, answer[:, None]).sum() / 6
            assert summed.item() == pytest.approx(made.sequences_scores[row].item(), abs=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(
    model: nn.Module, samples: list[dict[str, Tensor]], trained: DeepPrefix, reentrant: bool
):
    """Of a frozen language model, whose layers run again when the context has ended."""
    read_deep(model)
    batch = batched(samples, "right")
    token = torch.tensor([300])
    vectors = torch.randn(2, 1, model.config.text_config.hidden_size, dtype=torch.float64)
    batch["input_ids"][:, 10] = token
    vectors.requires_grad_(True)  # as the prefix's are

    def gradients() -> list[Tensor]:
        trained.zero_grad()
        vectors.grad = None
        with latents_in_place(model, token, vectors, trained):
            found = model.train()(**batch, use_cache=False).logits
        found.log_softmax(-1)[:, SHORT - 1, 50].sum().backward()
        grads = [trained.keys_LKDE.grad, trained.values_LKDE.grad, vectors.grad]
        assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
        return [grad.clone() for grad in grads if grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for found, wanted in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-7)


def test_a_new_one_learns_from_the_first_step(
    model: nn.Module, samples: list[dict[str, Tensor]], settings: DeepSettings
):
    """Values in every layer at once, keys as soon as there are values."""
    read_deep(model)
    deep = fresh(settings)
    for step in range(2):
        deep.zero_grad()
        logits(model, deep, **samples[1]).log_softmax(-1)[0, -1, 50].backward()
        assert deep.values_LKDE.grad is not None
        assert deep.keys_LKDE.grad is not None
        assert (deep.values_LKDE.grad.flatten(1).abs().amax(1) > 0).all()
        assert (deep.keys_LKDE.grad.flatten(1).abs().amax(1) > 0).all() == (step == 1)
        deep.values_LKDE.data += 0.1 * deep.values_LKDE.grad.sign()


def test_a_model_that_would_not_read_it_is_refused(model: nn.Module, trained: DeepPrefix):
    with pytest.raises(ContractError, match="reads no deep prefix"), deep_in_place(model, trained):
        pass
    config: Any = model.config
    config.text_config._attn_implementation = "eager"
    with pytest.raises(ConfigError, match="this model runs with eager; load it with attn_impl: sdpa"):
        read_deep(model)


def test_what_is_saved_of_a_model_does_not_name_its_attention(model: nn.Module, tmp_path: Path):
    read_deep(model)
    model.config.save_pretrained(tmp_path)
    assert ATTENTION not in (tmp_path / "config.json").read_text()


def test_a_folder_keeps_it_and_folders_without_are_as_before(settings: DeepSettings, tmp_path: Path):
    with_deep = PrefixSettings(4, 32, **SMALL, deep=settings)
    prefix, without = LatentPrefix(with_deep), LatentPrefix(PrefixSettings(4, 32, **SMALL))
    assert prefix.deep is not None
    prefix.deep.values_LKDE.data += 1
    write_prefix(tmp_path / "deep", trained_state(prefix, keep_prob=1.0, base="0"))
    write_prefix(tmp_path / "plain", trained_state(without, keep_prob=1.0, base="0"))
    found, plain = read_prefix(tmp_path / "deep"), read_prefix(tmp_path / "plain")
    assert found is not None
    assert plain is not None
    assert found.settings == with_deep
    again = build_prefix(found).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in prefix.state_dict().items())
    content = json.loads((tmp_path / "deep" / PREFIX_FILE).read_text())
    assert content["version"] == 2  # older releases refuse it by name
    content = json.loads((tmp_path / "plain" / PREFIX_FILE).read_text())
    assert content["version"] == 1
    assert "deep" not in content["settings"]
    # the next stage may add one, which adds nothing yet; none may leave one out
    next_stage = LatentPrefix(with_deep)
    load_weights(next_stage, plain, source=tmp_path)
    assert next_stage.deep is not None
    assert not next_stage.deep.values_LKDE.any()
    assert next_stage.resampler is not None
    assert without.resampler is not None
    assert torch.equal(next_stage.resampler.queries_MD, without.resampler.queries_MD)
    with pytest.raises(ConfigError, match=r"deep: \{'num': 3, .*\} there, None here"):
        load_weights(without, found, source=tmp_path)


def test_exported_vectors_keep_it_beside_them(settings: DeepSettings, tmp_path: Path):
    prefix = LatentPrefix(PrefixSettings(4, 32, **SMALL, deep=settings))
    assert prefix.deep is not None
    prefix.deep.values_LKDE.data += 1
    state = trained_state(prefix, keep_prob=1.0, base="0")
    exported = replace(state, weights=state.deep_weights, vectors_MH=torch.zeros(4, 32))
    write_prefix(tmp_path, exported)
    found = read_prefix(tmp_path)
    assert found is not None
    deep = build_deep(found)
    assert deep is not None
    assert torch.equal(deep.values_LKDE, prefix.deep.values_LKDE)
    with pytest.raises(ConfigError, match="no encoder to make others"):
        build_prefix(found)
