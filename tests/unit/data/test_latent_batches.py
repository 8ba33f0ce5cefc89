"""Where the text of a prompt stands, samples with latent tokens in its place, and batches that hold both."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from swift.model import get_model_processor
from swift.template import get_template

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.codec.latent_vocab import LatentVocab, latent_text
from coordexp.config.schema.prompt import Prompt
from coordexp.data.batch_meta import BatchMeta
from coordexp.data.collator import with_meta
from coordexp.data.dataset import read_training_rows
from coordexp.data.latent.batches import LatentBatch, with_latents
from coordexp.data.latent.other_prompts import OtherPrompts, PromptBatch, ShareOfSamples
from coordexp.data.latent.spans import SPAN, LatentQuestions, SpanMarker, find_span, with_latent_tokens
from coordexp.data.raw_samples import RawSamples
from coordexp.data.samples import EncodedSamples
from coordexp.data.shown import ShownRows
from coordexp.errors import ConfigError, RecordError
from coordexp.losses.columns import CoordColumns
from coordexp.models.latent_prefix.vocabulary import add_latent_tokens
from coordexp.swift_bridge.prompts import encode_sample
from coordexp.swift_bridge.template import register_coord_template

M = 3
TEXT = "Find: red box, blue circle."


@pytest.fixture(scope="module")
def template(nano_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    register_coord_template()
    path = tmp_path_factory.mktemp("latent") / "model"
    add_latent_tokens(nano_model, path, M)
    model, processor = get_model_processor(str(path), model_type="qwen3_vl")
    template = get_template(processor)
    template.set_mode("train")
    template.model = model
    return template


@pytest.fixture(scope="module")
def latent_ids(template: Any) -> tuple[int, ...]:
    return LatentVocab.from_tokenizer(template.tokenizer, M).ids


def rows(scenes: Path, order: str, user: str = TEXT) -> ShownRows:
    prompt = Prompt(user=user, system="You look.", media_order=order)
    return ShownRows(read_training_rows(scenes / "train.jsonl", prompt))


@pytest.mark.parametrize("order", ["media_first", "text_first"])
def test_a_sample_with_latent_tokens_is_what_the_template_makes_of_them(
    scenes: Path, template: Any, latent_ids: tuple[int, ...], order: str
):
    samples = EncodedSamples(rows(scenes, order), template, also=SpanMarker(template.tokenizer))
    sample = samples[1]
    start, stop = sample[SPAN]
    assert template.tokenizer.decode(sample["input_ids"][start:stop]) == TEXT
    spliced = with_latent_tokens(sample, latent_ids)
    wanted = encode_sample(template, rows(scenes, order, latent_text(M))[1].row)
    for key in ("input_ids", "labels", "length"):
        assert spliced[key] == wanted[key], key
    assert spliced["mm_token_type_ids"].tolist() == wanted["mm_token_type_ids"].tolist()
    assert "pixel_values" not in spliced
    assert torch.equal(spliced["image_grid_thw"], wanted["image_grid_thw"])


def test_questions_with_latent_tokens_are_what_the_template_makes_of_them(
    scenes: Path, template: Any, latent_ids: tuple[int, ...]
):
    questions = LatentQuestions(
        RawSamples(rows(scenes, "media_first"), template), template.tokenizer, latent_ids
    )
    wanted = RawSamples(rows(scenes, "media_first", latent_text(M)), template)[2]
    found = questions[2]
    assert (found.prompt_ids, found.messages, found.objects) == (
        wanted.prompt_ids,
        wanted.messages,
        wanted.objects,
    )
    assert template.tokenizer.decode(list(questions.text_of(found.sample_id))) == TEXT


def test_a_batch_holds_both_forms(scenes: Path, template: Any, latent_ids: tuple[int, ...]):
    columns = CoordColumns(CoordVocab.from_tokenizer(template.tokenizer).ids)
    samples = EncodedSamples(rows(scenes, "media_first"), template, also=SpanMarker(template.tokenizer))
    plain = template.data_collator
    collate = with_latents(with_meta(plain, columns), plain, latent_ids, [], columns)
    features = [samples[0], samples[1], samples[2]]
    batch = collate(features)
    meta, latent = BatchMeta.of(batch), LatentBatch.of(batch)
    text_ids, latent_inputs = batch["input_ids"], latent.inputs["input_ids"]
    rows_R = latent.rows(meta.rows)
    # the same tokens are taught, from the same places of the answers
    assert torch.equal(latent_inputs.flatten()[rows_R.positions_R + 1], rows_R.targets_R)
    assert torch.equal(text_ids.flatten()[meta.rows.positions_R + 1], rows_R.targets_R)
    assert latent.places_R.tolist().count(0) == 3
    assert (latent_inputs == latent_ids[0]).sum(1).tolist() == [1, 1, 1]
    pairs = zip(latent.text_ids_SL, latent.text_mask_SL, strict=True)
    assert [template.tokenizer.decode(ids[mask]) for ids, mask in pairs] == [TEXT] * 3
    inputs = latent.model_inputs(batch)
    assert inputs["pixel_values"] is batch["pixel_values"]
    assert inputs["position_ids"].shape[-1] == latent_inputs.shape[-1] < text_ids.shape[-1]
    marker = pickle.loads(pickle.dumps(SpanMarker(template.tokenizer)))  # workers are given it
    assert marker(rows(scenes, "media_first")[0].row, features[0])[SPAN] == features[0][SPAN]
    with pytest.raises(ConfigError, match="does not train on packs"):
        collate([features[:2]])


def test_the_first_entries_of_a_batch_are_it_without_the_labels_of_the_others(
    scenes: Path, template: Any, latent_ids: tuple[int, ...]
):
    columns = CoordColumns(CoordVocab.from_tokenizer(template.tokenizer).ids)
    samples = EncodedSamples(rows(scenes, "media_first"), template, also=SpanMarker(template.tokenizer))
    plain = template.data_collator
    collate = with_latents(with_meta(plain, columns), plain, latent_ids, [], columns)
    features = [samples[index] for index in range(3)]
    batch = collate(features)
    without = collate([*features[:2], {**features[2], "labels": [-100] * len(features[2]["labels"])}])
    kept, keep_R = BatchMeta.of(batch).first(2)
    wanted = BatchMeta.of(without)
    for name in ("positions_R", "targets_R", "bins_N"):
        assert torch.equal(getattr(kept.rows, name), getattr(wanted.rows, name)), name
    assert (kept.rows.num_text, kept.num_samples, kept.num_entries) == (wanted.rows.num_text, 2, 2)
    assert kept.sample_ids == wanted.sample_ids[:2]
    latent, wanted_latent = LatentBatch.of(batch).first(keep_R), LatentBatch.of(without)
    assert torch.equal(latent.positions_R, wanted_latent.positions_R)
    assert torch.equal(latent.places_R, wanted_latent.places_R)


@pytest.mark.parametrize("order", ["media_first", "text_first"])
def test_other_prompts_are_what_the_template_makes_of_them(scenes: Path, template: Any, order: str):
    """A list of names with nothing in its place, and the first three tokens of the text as a text of its own."""
    columns, tok = CoordColumns(CoordVocab.from_tokenizer(template.tokenizer).ids), template.tokenizer
    prompt, plain = Prompt(user="Find: {classes}."), template.data_collator
    cut = tok.decode(tok.encode(TEXT)[:3])
    samples = EncodedSamples(rows(scenes, order), template, also=SpanMarker(tok))
    batches = OtherPrompts.of(prompt, plain, tok, columns, [], 3)([samples[0], samples[2]])
    for name, text in (("none", "Find: ."), ("cut", cut)):
        encoded = [encode_sample(template, rows(scenes, order, text)[index].row) for index in (0, 2)]
        wanted = plain(encoded)
        found = PromptBatch(**batches[name])
        assert torch.equal(found.inputs["input_ids"], wanted["input_ids"]), name
        for key in ("attention_mask", "position_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw"):
            assert torch.equal(found.inputs[key], wanted[key]), (name, key)
        assert torch.equal(found.inputs["input_ids"].flatten()[found.positions_R + 1], found.targets_R)
        is_answer = wanted["labels"] != -100
        assert sorted(found.targets_R) == sorted(wanted["labels"][is_answer])
        first = found.targets_R[found.places_R == 0]
        assert sorted(first) == sorted(
            row[mask][0] for row, mask in zip(wanted["labels"], is_answer, strict=True)
        )


def test_a_prompt_without_a_list_leaves_no_text_and_ranks_share_the_samples(scenes: Path, template: Any):
    columns, tok = CoordColumns(CoordVocab.from_tokenizer(template.tokenizer).ids), template.tokenizer
    collate = OtherPrompts.of(Prompt(user=TEXT), template.data_collator, tok, columns, [], 3)
    samples = EncodedSamples(rows(scenes, "media_first"), template, also=SpanMarker(tok))
    (ids,) = collate([samples[0]])["none"]["inputs"]["input_ids"]
    assert tok.decode(ids).split("<|vision_end|>")[1].startswith("<|im_end|>\n<|im_start|>assistant")
    shares = [ShareOfSamples(samples, rank, 3) for rank in range(3)]  # 8 scenes: the third rank is one short
    assert [len(share) for share in shares] == [3, 3, 3]
    taught = [
        [PromptBatch(**collate([share[i]])["cut"]).targets_R.numel() for i in range(3)] for share in shares
    ]
    labels = [sum(label != -100 for label in samples[index]["labels"]) for index in range(8)]
    assert taught == [labels[0::3], labels[1::3], [*labels[2::3], 0]]


def test_spans():
    assert find_span([1, 2, 3, 2, 3, 4], [2, 3]) == (3, 5)
    with pytest.raises(RecordError, match="other tokens in the prompt"):
        find_span([1, 2, 3], [3, 4])
