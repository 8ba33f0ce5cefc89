"""A latent prefix on a 2-layer Qwen3-VL with images: what it must leave as it is, how it starts, how it is kept.

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

from coordexp.codec.latent_vocab import LatentVocab, latent_text, num_latent_tokens
from coordexp.errors import ConfigError, ContractError
from coordexp.models.latent_prefix.dropout import drop_latents, keep_mask, training_key
from coordexp.models.latent_prefix.folder import (
    PREFIX_FILE,
    SavedPrefix,
    base_hash,
    base_probe,
    build_prefix,
    check_base,
    load_weights,
    read_prefix,
    trained_state,
    write_prefix,
)
from coordexp.models.latent_prefix.place import check_places, latents_in_place, place_vectors
from coordexp.models.latent_prefix.prefix import LatentPrefix, PrefixSettings
from coordexp.models.latent_prefix.resampler import rms, segment_means
from coordexp.models.latent_prefix.vocabulary import add_latent_tokens

M, LENGTH, START = 5, 24, 8
SMALL = {"width": 16, "heads": 2, "layers": 1, "mlp_width": 24}


@pytest.fixture(scope="module")
def folder(nano_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("latents") / "model"
    assert add_latent_tokens(nano_model, path, M).num_added == M
    return path


@pytest.fixture(scope="module")
def tok(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> nn.Module:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder).double()


@pytest.fixture
def model(loaded: nn.Module) -> nn.Module:
    loaded.requires_grad_(False)
    loaded.gradient_checkpointing_disable()
    return loaded.eval()


@pytest.fixture(scope="module")
def latent_ids(tok: Any) -> Tensor:
    return torch.tensor(LatentVocab.from_tokenizer(tok, M).ids)


@pytest.fixture
def text_batch(model: nn.Module) -> dict[str, Tensor]:
    """Two samples: an image of 4 visual tokens, M tokens of text from START on, an answer; the first one padded."""
    g = torch.Generator().manual_seed(1)
    config: Any = model.config
    ids = torch.randint(40, 400, (2, LENGTH), generator=g)
    ids[:, 2:8] = torch.tensor(
        [config.vision_start_token_id, *[config.image_token_id] * 4, config.vision_end_token_id]
    )
    attention_mask = torch.ones_like(ids)
    attention_mask[0, 20:] = 0
    return {
        "input_ids": ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": torch.randn(2 * 16, 3 * 2 * 8 * 8, generator=g, dtype=torch.float64),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }


def with_latents(batch: dict[str, Tensor], latent_ids: Tensor) -> dict[str, Tensor]:
    ids = batch["input_ids"].clone()
    ids[:, START : START + M] = latent_ids
    return {**batch, "input_ids": ids}


def text_of(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Embeddings of the M tokens of text of each sample, and their mask."""
    ids = batch["input_ids"][:, START : START + M]
    return model.get_input_embeddings()(ids).detach(), torch.ones_like(ids, dtype=torch.bool)


# --- the model ---


def test_latents_that_are_the_embeddings_of_the_text_give_its_logits(
    model: nn.Module, text_batch: dict[str, Tensor], latent_ids: Tensor
):
    text = model(**text_batch, use_cache=False).logits
    latent_batch = with_latents(text_batch, latent_ids)
    with latents_in_place(model, latent_ids, text_of(model, text_batch)[0]):
        placed = model(**latent_batch, use_cache=False).logits
    assert torch.equal(placed, text)
    without = model(**latent_batch, use_cache=False).logits
    assert (without - text).abs().max() > 1e-3  # and the hook has gone


def test_a_new_encoder_of_as_many_latents_as_tokens_gives_the_logits_of_the_text(
    model: nn.Module, text_batch: dict[str, Tensor], latent_ids: Tensor
):
    text = model(**text_batch, use_cache=False).logits
    prefix = LatentPrefix(PrefixSettings(M, model.config.text_config.hidden_size, **SMALL))
    ids = text_batch["input_ids"][:, START : START + M]

    def make(embedding: nn.Module) -> Tensor:
        return prefix(embedding(ids), torch.ones_like(ids, dtype=torch.bool))

    with latents_in_place(model, latent_ids, make):
        placed = model(**with_latents(text_batch, latent_ids), use_cache=False).logits
    torch.testing.assert_close(placed, text, atol=1e-5, rtol=0)


def test_generate_writes_what_forwards_expect(
    model: nn.Module, text_batch: dict[str, Tensor], latent_ids: Tensor
):
    """With images, padding on the left, and another prefix for each sample."""
    vectors = 2 * torch.randn(2, M, model.config.text_config.hidden_size).double()
    prompt = {k: v for k, v in with_latents(text_batch, latent_ids).items() if k != "attention_mask"}
    ids = prompt["input_ids"]
    pad = torch.full((1, 3), 7)
    ids = torch.cat([torch.cat([pad, ids[:1]], 1), torch.cat([ids[1:], ids[1:, -3:]], 1)])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    prompt |= {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == model.config.image_token_id).long(),
    }
    with latents_in_place(model, latent_ids, vectors), torch.no_grad():
        answers = model.generate(**prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
    for sample in range(2):
        start = 3 * (sample == 0)
        whole = answers[sample : sample + 1, start:]
        alone = {
            "input_ids": whole,
            "mm_token_type_ids": (whole == model.config.image_token_id).long(),
            "pixel_values": prompt["pixel_values"].chunk(2)[sample],
            "image_grid_thw": prompt["image_grid_thw"][sample : sample + 1],
        }
        with latents_in_place(model, latent_ids, vectors[sample : sample + 1]), torch.no_grad():
            expected = model(**alone, use_cache=False).logits.argmax(-1)
        assert expected[0, -7:-1].tolist() == whole[0, -6:].tolist()
    # without its prefix a sample reads on differently
    with torch.no_grad():
        other = model(**alone, use_cache=False).logits.argmax(-1)
    assert other[0, -7:-1].tolist() != whole[0, -6:].tolist()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_prefix_the_same_gradients(
    model: nn.Module, text_batch: dict[str, Tensor], latent_ids: Tensor, reentrant: bool
):
    """Of a frozen language model in training mode, where only the prefix asks for gradients."""
    prefix = LatentPrefix(PrefixSettings(M, model.config.text_config.hidden_size, **SMALL)).double()
    for block in prefix.parameters():
        block.data += 0.05 * torch.randn(block.shape, generator=torch.Generator().manual_seed(2))
    batch = with_latents(text_batch, latent_ids)
    text, mask = text_of(model, text_batch)

    def gradients() -> list[Tensor]:
        prefix.zero_grad()
        with latents_in_place(model, latent_ids, lambda _: prefix(text, mask)):
            logits = model.train()(**batch, use_cache=False).logits
        logits.float().log_softmax(-1)[:, -1, 50].sum().backward()
        return [weight.grad.clone() for weight in prefix.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for found, wanted in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-6)
    assert all(grad.abs().sum() > 0 for grad in plain)


def test_vectors_go_to_their_samples_in_a_pack_as_in_a_batch():
    latent_ids = torch.tensor([90, 91])
    vectors = torch.arange(12.0).view(3, 2, 2) + 100
    batch = torch.tensor([[1, 90, 91, 5], [90, 91, 2, 2], [3, 4, 90, 91]])
    embeds = batch[..., None].float().expand(-1, -1, 2)
    placed = place_vectors(embeds, batch, latent_ids, vectors)
    assert placed[:, :, 0].tolist() == [[1, 100, 102, 5], [104, 106, 2, 2], [3, 4, 108, 110]]
    pack = place_vectors(embeds.reshape(1, 12, 2), batch.view(1, 12), latent_ids, vectors)
    assert torch.equal(pack.view(3, 4, 2), placed)
    check_places(batch, (90, 91), 3)
    with pytest.raises(ContractError, match="3 samples with 2 latent tokens"):
        check_places(batch.flip(1), (90, 91), 3)
    with pytest.raises(ContractError, match="2 samples"):
        check_places(batch, (90, 91), 2)


def test_a_forward_that_embeds_no_ids_is_an_error(model: nn.Module, latent_ids: Tensor):
    with (
        pytest.raises(ContractError, match="did not embed token ids"),
        latents_in_place(model, latent_ids, torch.zeros(1, M, 32)),
    ):
        pass


# --- encoder and adapter ---


def test_segment_means_by_hand():
    text = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]])
    whole = torch.ones(1, 4, dtype=torch.bool)
    assert segment_means(text, whole, 2).flatten().tolist() == [1.5, 6.0]
    assert segment_means(text, whole, 4).flatten().tolist() == [1, 2, 4, 8]
    assert segment_means(text, whole, 8).flatten().tolist() == [1, 1, 2, 2, 4, 4, 8, 8]
    three = torch.tensor([[False, True, True, True]])  # 2, 4, 8: parts of a token and a half
    assert segment_means(text, three, 2).flatten().tolist() == pytest.approx(
        [(2 + 4 / 2) / 1.5, (4 / 2 + 8) / 1.5]
    )


def test_padding_of_the_text_changes_nothing():
    prefix = LatentPrefix(PrefixSettings(3, 8, **SMALL)).double()
    for weight in prefix.parameters():
        weight.data += 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(4))
    text = torch.randn(1, 7, 8, dtype=torch.float64)
    alone = prefix(text, torch.ones(1, 7, dtype=torch.bool))
    noise = torch.full((1, 4, 8), 50.0, dtype=torch.float64)
    mask = torch.tensor([[False] * 2 + [True] * 7 + [False] * 2])
    padded = prefix(torch.cat([noise[:, :2], text, noise[:, :2]], 1), mask)
    torch.testing.assert_close(padded, alone, atol=1e-12, rtol=0)


@pytest.mark.parametrize("scale", [0.02, 1.0, 30.0])
def test_vectors_have_the_scale_of_the_text(scale: float):
    prefix = LatentPrefix(PrefixSettings(4, 16, **SMALL))
    assert prefix.resampler is not None
    assert prefix.adapter is not None
    for weight in (*prefix.resampler.parameters(), *prefix.adapter.outer.parameters()):
        weight.data += torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    text = scale * torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(6))
    mask = torch.arange(9) < torch.tensor([[9], [4], [1]])
    torch.testing.assert_close(rms(prefix(text, mask)), rms(text, mask), rtol=1e-5, atol=0)


def test_static_vectors_start_from_the_text():
    prefix = LatentPrefix(PrefixSettings(2, 3, source="static"))
    text = torch.arange(12.0).view(1, 4, 3)
    prefix.start_from(text, torch.ones(1, 4, dtype=torch.bool))
    assert prefix(text, torch.ones(1, 4, dtype=torch.bool))[0].tolist() == [[1.5, 2.5, 3.5], [7.5, 8.5, 9.5]]
    assert [name for name, _ in prefix.named_parameters()] == ["vectors_MH"]


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match="multiple of 12"):
        PrefixSettings(4, 16, width=16, heads=6)


# --- dropout ---


def test_latents_are_dropped_by_key_alone():
    keys = [f"7 3 file:{line}" for line in range(400)]
    kept = keep_mask(keys, 8, 0.85)
    assert torch.equal(keep_mask(keys[5:7], 8, 0.85), kept[5:7])
    assert kept.float().mean().item() == pytest.approx(0.85, abs=0.02)
    assert keep_mask(keys, 8, 0.01).sum(1).min() >= 1
    assert keep_mask(keys, 8, 1.0).all()
    vectors = torch.ones(2, 2, 3)
    assert drop_latents(vectors, torch.tensor([[True, False], [True, True]])).sum(-1).tolist() == [
        [3, 0],
        [3, 3],
    ]


# --- vocabulary ---


def test_latent_tokens_are_added_behind_the_others(folder: Path, nano_model: Path, tok: Any):
    from transformers import AutoModelForImageTextToText

    assert num_latent_tokens(tok) == M
    between = tok.encode(f"<|vision_end|>{latent_text(M)}<|im_end|>", add_special_tokens=False)[1:-1]
    assert between == list(LatentVocab.from_tokenizer(tok, M).ids)
    before = AutoModelForImageTextToText.from_pretrained(nano_model).get_input_embeddings().weight
    after = AutoModelForImageTextToText.from_pretrained(folder).get_input_embeddings().weight
    old = len(tok) - M
    assert torch.equal(after[:old], before[:old])
    assert after.shape[0] >= len(tok)
    assert after.shape[0] == max(before.shape[0], -(-len(tok) // 64) * 64)  # spare rows are used first
    assert add_latent_tokens(folder, folder.parent / "again", M).num_added == 0
    with pytest.raises(ConfigError, match="lacks 2 of 7 latent tokens"):
        LatentVocab.from_tokenizer(tok, M + 2)


# --- folder ---


def test_a_folder_gives_back_what_was_written(model: nn.Module, tok: Any, tmp_path: Path):
    prefix = LatentPrefix(PrefixSettings(M, 32, **SMALL))
    vectors = torch.randn(M, 32)
    base = base_hash(model, tok)
    saved = replace(trained_state(prefix, keep_prob=0.85, base=base, prompt="Find é."), vectors_MH=vectors)
    write_prefix(tmp_path, saved)
    found = read_prefix(tmp_path)
    assert found is not None
    assert (found.settings, found.keep_prob, found.prompt, found.base_hash) == (
        prefix.settings,
        0.85,
        "Find é.",
        base,
    )
    assert found.vectors_MH is not None
    assert torch.equal(found.vectors_MH, vectors)
    again = build_prefix(found).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in prefix.state_dict().items())
    check_base(found, model, tok, source=tmp_path)
    check_base(found, model.bfloat16(), tok, source=tmp_path)
    model.double()
    assert read_prefix(tmp_path / "empty") is None


def test_another_base_is_refused(model: nn.Module, tok: Any, tmp_path: Path):
    saved = SavedPrefix(PrefixSettings(M, 32, **SMALL), base_hash(model, tok))
    weight = model.get_input_embeddings().weight
    before = weight.detach().clone()
    weight.data[tok.convert_tokens_to_ids("<|coord_7|>")] += 1
    weight.data[tok.convert_tokens_to_ids("<|latent_1|>")] += 1
    check_base(saved, model, tok, source=tmp_path)  # rows that training and baking change do not count
    weight.data += 0.5
    with pytest.raises(ConfigError, match="trained with another base model"):
        check_base(saved, model, tok, source=tmp_path)
    weight.data = before


def test_a_base_without_the_lora_weights_of_its_prefix_is_refused(folder: Path, tok: Any, tmp_path: Path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained(folder)
    tuned = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    )
    settings = PrefixSettings(M, 32, **SMALL)
    write_prefix(tmp_path, SavedPrefix(settings, base_hash(tuned, tok), base_probe=base_probe(tuned, tok)))
    saved = read_prefix(tmp_path)
    assert saved is not None
    check_base(saved, tuned, tok, source=tmp_path)
    with tuned.disable_adapter(), pytest.raises(ConfigError, match="Are the LoRA weights or offsets missing"):
        check_base(saved, tuned, tok, source=tmp_path)
    merged = tuned.merge_and_unload()
    check_base(saved, merged, tok, source=tmp_path)
    check_base(saved, merged.bfloat16(), tok, source=tmp_path)


def test_folders_that_do_not_fit_are_refused(tmp_path: Path):
    prefix = LatentPrefix(PrefixSettings(M, 32, **SMALL))
    write_prefix(tmp_path, trained_state(prefix, keep_prob=1.0, base="0" * 64))
    found = read_prefix(tmp_path)
    assert found is not None
    with pytest.raises(ConfigError, match="num_latents: 5 there, 6 here"):
        load_weights(LatentPrefix(PrefixSettings(6, 32, **SMALL)), found, source=tmp_path)
    with pytest.raises(ConfigError, match="no encoder to make others"):
        build_prefix(replace(found, weights={}))
    content = json.loads((tmp_path / PREFIX_FILE).read_text())
    (tmp_path / PREFIX_FILE).write_text(json.dumps({**content, "version": 3}))
    with pytest.raises(ConfigError, match="version 3; this release of coordexp reads versions 1 and 2"):
        read_prefix(tmp_path)
    (tmp_path / PREFIX_FILE).write_text(json.dumps({k: v for k, v in content.items() if k != "source"}))
    with pytest.raises(ConfigError, match="no whole latent prefix"):
        read_prefix(tmp_path)


def test_latent_dropout_of_a_sample_does_not_depend_on_where_its_file_lies() -> None:
    here = training_key(1, 2, "/data/one/train.jsonl:3")
    assert training_key(1, 2, "elsewhere/train.jsonl:3") == here
    others = [
        (2, 2, "train.jsonl:3"),
        (1, 3, "train.jsonl:3"),
        (1, 2, "train.jsonl:4"),
        (1, 2, "more.jsonl:3"),
    ]
    assert len({here, *(training_key(*other) for other in others)}) == 5
