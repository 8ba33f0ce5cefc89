"""`coordexp infer` with a latent prefix: as the text where it is the text, exported and baked as the encoder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.latents import asked_scenes, latent_checkpoint
from transformers import AutoModelForImageTextToText, AutoTokenizer

from coordexp.codec.latent_vocab import LatentVocab
from coordexp.config.prompt import read_prompt
from coordexp.errors import ConfigError, RecordError
from coordexp.inference.infer import Inference, infer_file
from coordexp.inference.latents import export_prefix
from coordexp.inference.settings import InferSettings
from coordexp.models.export import export_model
from coordexp.models.latent_prefix.folder import PREFIX_FILE, PREFIX_WEIGHTS, read_prefix
from coordexp.models.model_files import PREFIX_FILES
from coordexp.rollout.backends.vllm_latent import as_engine_rows

PROMPT = "Detect {classes}."
NAMES = [["red box", "blue circle", "green box"], ["black triangle", "red circle"]]
M = 4


@pytest.fixture(scope="module")
def checkpoint(nano_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return latent_checkpoint(nano_model, tmp_path_factory.mktemp("latents") / "checkpoint", PROMPT, M)


@pytest.fixture(scope="module")
def data(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return asked_scenes(scenes, tmp_path_factory.mktemp("asked"), NAMES)


@pytest.fixture(scope="module")
def first_list(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return asked_scenes(scenes, tmp_path_factory.mktemp("first"), NAMES[:1])


def answers(model: Path, data: Path, output: Path, **settings: Any) -> list[dict[str, Any]]:
    """What the model wrote, token for token, with log-probabilities."""
    infer_file(model, data, output, max_new_tokens=20, **settings)
    kept = ("text", "token_logprobs", "num_prompt_tokens")
    lines = [json.loads(line) for line in (output / "pred_token_trace.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in kept} for line in lines]


def texts(found: list[dict[str, Any]]) -> list[str]:
    return [line["text"] for line in found]


def flat(found: list[dict[str, Any]]) -> list[float]:
    return [value for line in found for value in line["token_logprobs"]]


def test_vectors_that_are_the_texts_embeddings_answer_as_the_text(
    nano_model: Path, first_list: Path, tmp_path: Path
):
    """A fresh encoder of as many latents as the text has tokens: generation with pictures, to rounding."""
    tok: Any = AutoTokenizer.from_pretrained(nano_model)
    text = PROMPT.replace("{classes}", ", ".join(NAMES[0]))
    number = len(tok.encode(text))
    model = latent_checkpoint(nano_model, tmp_path / "model", PROMPT, number, trained=False)
    latent = answers(model, first_list, tmp_path / "latent")
    written = answers(model, first_list, tmp_path / "text", prompt_latents="none")
    assert texts(latent) == texts(written)
    assert flat(latent) == pytest.approx(flat(written), abs=1e-5)
    assert [line["num_prompt_tokens"] for line in latent] == [line["num_prompt_tokens"] for line in written]


def test_exported_and_baked_vectors_answer_as_the_encoder_does(
    checkpoint: Path, first_list: Path, tmp_path: Path
):
    """Token for token; a baked checkpoint is asked as any other, and its embedding and head are two matrices."""
    text = export_prefix(checkpoint, tmp_path / "vectors", classes=NAMES[0])
    assert text == "Detect red box, blue circle, green box."
    saved = read_prefix(tmp_path / "vectors")
    assert saved is not None
    assert saved.prompt == text
    assert saved.vectors_MH is not None
    encoder = answers(checkpoint, first_list, tmp_path / "encoder")
    exported = answers(
        checkpoint, first_list, tmp_path / "exported", prompt_latents=str(tmp_path / "vectors")
    )
    assert exported == encoder
    export_prefix(checkpoint, tmp_path / "baked", classes=NAMES[0], bake=True)
    record = read_prompt(tmp_path / "baked")
    assert record is not None
    assert record.prompt.user == "<|latent_0|><|latent_1|><|latent_2|><|latent_3|>"
    baked = answers(tmp_path / "baked", first_list, tmp_path / "of_baked")
    assert texts(baked) == texts(encoder)
    assert flat(baked) == pytest.approx(flat(encoder), abs=1e-6)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "baked")
    ids = LatentVocab.from_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "baked"), M).ids
    torch.testing.assert_close(model.get_input_embeddings().weight[list(ids)], saved.vectors_MH)
    before = AutoModelForImageTextToText.from_pretrained(checkpoint).get_output_embeddings().weight
    assert torch.equal(model.get_output_embeddings().weight, before)


def test_a_deep_prefix_is_read_beside_the_vectors_or_refused(
    nano_model: Path, checkpoint: Path, first_list: Path, tmp_path: Path
):
    """Of a checkpoint and of exported vectors alike; nothing but transformers can read it."""
    deep = latent_checkpoint(nano_model, tmp_path / "deep", PROMPT, M, num_deep=2)
    found = answers(deep, first_list, tmp_path / "found")
    assert flat(found) != pytest.approx(flat(answers(checkpoint, first_list, tmp_path / "without")), abs=0.01)
    export_prefix(deep, tmp_path / "vectors", classes=NAMES[0])
    vectors = str(tmp_path / "vectors")
    assert answers(deep, first_list, tmp_path / "exported", prompt_latents=vectors) == found
    # a fresh one answers as the checkpoint without, and in text none is read
    fresh = latent_checkpoint(nano_model, tmp_path / "fresh", PROMPT, M, num_deep=2, trained=False)
    plain = latent_checkpoint(nano_model, tmp_path / "plain", PROMPT, M, trained=False)
    assert answers(fresh, first_list, tmp_path / "a") == answers(plain, first_list, tmp_path / "b")
    asked_in_text = [
        answers(model, first_list, tmp_path / f"text_{model.name}", prompt_latents="none")
        for model in (deep, checkpoint)
    ]
    assert asked_in_text[0] == asked_in_text[1]
    settings = InferSettings(prompt_latents=vectors, backend="vllm")
    with pytest.raises(ConfigError, match="holds a deep prefix, which --backend vllm cannot read"):
        Inference.prepare(deep, first_list, tmp_path / "out", settings)
    with pytest.raises(ConfigError, match="a deep prefix cannot be baked"):
        export_prefix(deep, tmp_path / "baked", classes=NAMES[0], bake=True)
    assert not (tmp_path / "baked").exists()


def test_a_model_that_is_handed_over_keeps_its_prefix(checkpoint: Path, tmp_path: Path):
    """Else it would be asked in text without a word."""
    assert PREFIX_FILES == (PREFIX_FILE, PREFIX_WEIGHTS)
    export_model(checkpoint, tmp_path / "exported", merge=False)
    kept, theirs = read_prefix(tmp_path / "exported"), read_prefix(checkpoint)
    assert kept is not None
    assert theirs is not None
    assert kept.base_hash == theirs.base_hash
    index = json.loads((tmp_path / "exported" / "model.safetensors.index.json").read_text())
    with safe_open(tmp_path / "exported" / "model.safetensors", framework="pt") as weights:
        assert index["weight_map"] == dict.fromkeys(weights.keys(), "model.safetensors")
    assert kept.weights.keys() == theirs.weights.keys()
    assert all(torch.equal(kept.weights[name], tensor) for name, tensor in theirs.weights.items())


def test_every_record_is_asked_with_its_own_list(
    checkpoint: Path, data: Path, first_list: Path, tmp_path: Path
):
    """In M tokens, whatever its length; the text takes as many as it has; a cut text as many as it is cut to."""
    found = answers(checkpoint, data, tmp_path / "own")
    of_first = answers(checkpoint, first_list, tmp_path / "first")
    assert texts(found)[::2] == texts(of_first)[::2]
    assert flat(found)[:5] == pytest.approx(flat(of_first)[:5], abs=1e-5)
    assert flat(found[1:2]) != pytest.approx(flat(of_first[1:2]), abs=1e-4)
    written = answers(checkpoint, data, tmp_path / "text", prompt_latents="none")
    cut = answers(checkpoint, data, tmp_path / "cut", prompt_latents="none", cut_prompt=M)
    [tokens] = {line["num_prompt_tokens"] for line in found}
    assert {line["num_prompt_tokens"] for line in cut} == {tokens}
    assert written[0]["num_prompt_tokens"] > written[1]["num_prompt_tokens"] > tokens


def test_vectors_of_another_prompt_are_refused(checkpoint: Path, data: Path, tmp_path: Path):
    export_prefix(checkpoint, tmp_path / "vectors", classes=NAMES[0])
    settings = InferSettings(prompt_latents=str(tmp_path / "vectors"))
    with pytest.raises(
        RecordError, match=r"asked.jsonl:2: asks 'Detect black triangle, red circle.', and the vec"
    ):
        Inference.prepare(checkpoint, data, tmp_path / "out", settings)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (
            {"backend": "openai", "base_url": "http://127.0.0.1:9/v1", "served_model": "model"},
            r"--backend openai cannot read: .*no vectors beside a picture.*export-prefix .* --bake",
        ),
        ({"prompt_latents": "nowhere"}, "--prompt-latents nowhere: holds no latent_prefix.json"),
        ({"prompt_latents": "none", "keep_prob": 0.5}, "--keep-prob is of a latent prefix"),
        ({"keep_prob": 0.0}, "--keep-prob 0: expected a probability above 0"),
    ],
)
def test_what_cannot_be_is_refused(checkpoint: Path, data: Path, tmp_path: Path, settings: Any, fault: str):
    with pytest.raises(ConfigError, match=fault):
        Inference.prepare(checkpoint, data, tmp_path / "out", InferSettings(**settings))


def test_an_engine_adds_nothing_to_vectors_in_its_deepstack_layers():
    """Its rows are an embedding, then what is added to each of the first layers of the language model."""
    rows = as_engine_rows(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), levels=2)
    assert rows.tolist() == [[1, 2, 0, 0, 0, 0], [3, 4, 0, 0, 0, 0]]


def test_vectors_are_kept_as_in_training_or_it_is_said(
    nano_model: Path, first_list: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    model = latent_checkpoint(nano_model, tmp_path / "model", PROMPT, M, keep_prob=0.5)
    with caplog.at_level(logging.WARNING):
        half = answers(model, first_list, tmp_path / "half")
    assert "each vector is kept with probability 0.5, as in training; --keep-prob 1 keeps all" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        whole = answers(model, first_list, tmp_path / "whole", keep_prob=1.0)
    assert "trained with a keep probability of 0.5 at last, and are used with 1" in caplog.text
    assert flat(half) != pytest.approx(flat(whole), abs=1e-4)
    export_prefix(model, tmp_path / "vectors", classes=NAMES[0])
    saved = read_prefix(tmp_path / "vectors")
    assert saved is not None
    assert saved.vectors_MH is not None
    assert 1 <= int((saved.vectors_MH == 0).all(-1).sum()) < M
    assert answers(model, first_list, tmp_path / "exported", prompt_latents=str(tmp_path / "vectors")) == half
