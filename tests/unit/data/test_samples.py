"""Samples as a template encodes them: whole rows for stage 1, prompts for stage 2, and what cannot be encoded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from swift.model import get_model_processor
from swift.template import get_template

from coordexp.codec.serialize import serialize
from coordexp.config import Prompt
from coordexp.config.schema.augmentation import Augmentation
from coordexp.data.augment.augmenter import Augmenter
from coordexp.data.batch_meta import BatchMeta
from coordexp.data.collator import with_meta
from coordexp.data.dataset import RowMaker, read_training_rows
from coordexp.data.raw_samples import RawSamples
from coordexp.data.samples import EncodedSamples
from coordexp.data.shown import ShownRows
from coordexp.data.source import SampleSource
from coordexp.errors import RecordError
from coordexp.losses.columns import CoordColumns
from coordexp.pictures import open_picture
from coordexp.swift_bridge.draws import Draw
from coordexp.swift_bridge.prompts import encode_prompt
from coordexp.swift_bridge.template import register_coord_template

ANSWER = {"role": "assistant", "content": "{"}
CAT = {"desc": "cat", "bbox_2d": [10, 20, 300, 400]}


@pytest.fixture(scope="module")
def template(nano: Path) -> Any:
    register_coord_template()
    _, processor = get_model_processor(str(nano), model_type="qwen3_vl", load_model=False)
    template = get_template(processor)
    template.set_mode("train")
    return template


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six records; the third has 30 objects, the others one."""
    for index in range(6):
        shade = 40 * index
        Image.new("RGB", (64, 64), (shade, shade, shade)).save(tmp_path / f"{index}.png")
    records = [
        {"images": [f"{index}.png"], "width": 64, "height": 64, "objects": [CAT] * (30 if index == 2 else 1)}
        for index in range(6)
    ]
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def limited(template: Any, max_length: int | None, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(template, "max_length", max_length)
    return template


def test_a_sample_that_is_too_long_is_named(template: Any, data: Path, monkeypatch: pytest.MonkeyPatch):
    rows = read_training_rows(data, Prompt(user="Detect."))
    samples = EncodedSamples(ShownRows(rows), limited(template, 128, monkeypatch))
    assert [len(samples[index]["input_ids"]) for index in (0, 1)] == [samples[3]["length"]] * 2
    with pytest.raises(
        RecordError, match=r"larger than the max_length\(128\)\). Raise global_max_length"
    ) as caught:
        samples[2]
    assert str(caught.value).startswith(f"{data}:3: is too long (")


def test_a_picture_that_is_gone_is_named(template: Any, data: Path):
    rows = read_training_rows(data, Prompt(user="Detect."))
    (data.parent / "4.png").unlink()
    with pytest.raises(RecordError, match=r"4\.png") as caught:
        EncodedSamples(ShownRows(rows), template)[4]
    assert str(caught.value).startswith(f"{data}:5: ")


def test_without_strict_another_sample_takes_its_place_and_is_counted(
    template: Any, data: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = read_training_rows(data, Prompt(user="Detect."))
    samples = EncodedSamples(ShownRows(rows), limited(template, 128, monkeypatch), strict=False, seed=5)
    drawn = samples[2]
    source = SampleSource.of_sample(drawn)
    assert source.in_place_of == f"{data}:3"
    assert source.sample_id != f"{data}:3"
    other = int(source.sample_id.rpartition(":")[2]) - 1
    assert drawn["labels"] == samples[other]["labels"]
    torch.testing.assert_close(drawn["pixel_values"], samples[other]["pixel_values"])
    again = EncodedSamples(ShownRows(rows), template, strict=False, seed=5)[2]
    assert SampleSource.of_sample(again) == source
    collate = with_meta(
        lambda features: {"labels": torch.tensor([feature["labels"] for feature in features])},
        CoordColumns([20, 21, 22]),
    )
    assert BatchMeta.of(collate([samples[0], drawn, samples[1]])).num_replaced == 1
    assert BatchMeta.of(collate([samples[0], samples[1]])).num_replaced == 0


def test_where_nothing_can_be_encoded_not_strict_is_no_help(
    template: Any, data: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = read_training_rows(data, Prompt(user="Detect."))
    samples = EncodedSamples(ShownRows(rows), limited(template, 8, monkeypatch), strict=False)
    with pytest.raises(RecordError, match=rf"10 drawn for one .*The first: {data}:1: is too long"):
        samples[0]


def test_the_prompt_of_a_row_does_not_depend_on_its_answer(template: Any, data: Path):
    for row in read_training_rows(data, Prompt(user="Detect.")):
        whole = template.encode(row)
        start = next(index for index, label in enumerate(whole["labels"]) if label != -100)
        prompt = encode_prompt(template, row)
        assert prompt.token_ids == tuple(whole["input_ids"][:start])
        torch.testing.assert_close(prompt.pixel_values_PD, whole["pixel_values"])


def test_a_ground_truth_that_is_too_long_can_still_be_asked_about(
    template: Any, data: Path, monkeypatch: pytest.MonkeyPatch
):
    """A step that discards the ground truth needs the prompt alone."""
    shown = ShownRows(read_training_rows(data, Prompt(user="Detect.")))
    samples = RawSamples(shown, limited(template, 128, monkeypatch))
    assert samples[2].prompt_ids == samples[0].prompt_ids
    assert len(samples[2].objects) == 30
    with pytest.raises(RecordError) as caught:
        RawSamples(
            ShownRows(read_training_rows(data, Prompt(user="Detect."))), limited(template, 8, monkeypatch)
        )[1]
    assert str(caught.value).startswith(f"{data}:2: is too long (")


def test_a_source_survives_as_text():
    for source in (
        SampleSource("coco", "a.jsonl:3"),
        SampleSource("", 'a "b":1', "c.jsonl:2"),
        SampleSource(),
    ):
        assert SampleSource.of_sample({"channel": source.to_text()}) == source
    assert SampleSource.of_sample({"channel": '["coco", "a.jsonl:3"]'}) == SampleSource("coco", "a.jsonl:3")


AUGMENTATION = {
    "enabled": True,
    "ops": [
        {"name": "hflip"},
        {"name": "random_crop", "params": {"scale": [0.5, 0.9]}},
        {"name": "grayscale"},
    ],
}


def augmented(data: Path) -> ShownRows:
    maker = RowMaker(Prompt(user="Detect."))
    augmenter = Augmenter(Augmentation.model_validate(AUGMENTATION), seed=1)
    return ShownRows(read_training_rows(data, maker.prompt), augmenter=augmenter, maker=maker)


def test_both_stages_are_shown_the_same_picture_and_objects(template: Any, data: Path):
    encoded, raw = EncodedSamples(augmented(data), template), RawSamples(augmented(data), template)
    for draw in (Draw(0), Draw(1, epoch=3), Draw(2, epoch=3, progress=0.5)):
        sample, question = encoded[draw], raw[draw]
        assert question.media is not None
        torch.testing.assert_close(question.media.pixel_values_PD, sample["pixel_values"])
        assert tuple(sample["input_ids"][: len(question.prompt_ids)]) == question.prompt_ids
        answer = template.tokenizer.decode(sample["input_ids"][len(question.prompt_ids) :])
        assert answer == serialize(question.objects) + "<|im_end|>"
        (picture,) = question.images  # what a rollout is asked about
        assert isinstance(picture, bytes)
        asked = template.encode({"messages": [*question.messages, ANSWER], "images": [picture]})
        torch.testing.assert_close(asked["pixel_values"], sample["pixel_values"])
        assert open_picture(picture).size == (question.width, question.height)
        assert question.objects != raw[Draw(int(draw), epoch=9)].objects


def test_objects_are_taught_in_the_order_of_the_changed_picture(template: Any, tmp_path: Path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    boxes = [{"desc": desc, "bbox_2d": [x, 100, x + 50, 200]} for desc, x in (("left", 100), ("right", 800))]
    record = {"images": ["a.png"], "width": 64, "height": 64, "objects": boxes}
    (tmp_path / "d.jsonl").write_text(json.dumps(record))
    maker = RowMaker(Prompt(user="Detect."))
    flip = Augmenter(Augmentation.model_validate({"enabled": True, "ops": [{"name": "hflip"}]}), seed=0)
    shown = ShownRows(read_training_rows(tmp_path / "d.jsonl", maker.prompt), augmenter=flip, maker=maker)
    assert [obj.desc for obj in RawSamples(shown, template)[0].objects] == ["right", "left"]


def test_without_augmentation_rollouts_are_asked_about_the_file(template: Any, data: Path):
    rows = read_training_rows(data, Prompt(user="Detect."))
    assert RawSamples(ShownRows(rows), template)[1].images == (str(data.parent / "1.png"),)


def test_a_picture_that_changed_after_its_file_was_checked_is_named(template: Any, data: Path):
    rows = read_training_rows(data, Prompt(user="Detect."))
    Image.new("RGB", (65, 64)).save(data.parent / "3.png")
    with pytest.raises(RecordError, match=r"d\.jsonl:4: image .*3\.png is 65 x 64 pixels by now"):
        EncodedSamples(ShownRows(rows), template)[3]
