"""Lengths told without pictures are those of encoded samples; what is too long is named before training."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from swift.model import get_model_processor
from swift.template import get_template

from coordexp.config import Prompt
from coordexp.data import lengths as module
from coordexp.data.dataset import read_training_rows
from coordexp.data.lengths import (
    check_lengths,
    longer_than,
    most_tokens,
    sample_lengths,
    warn_of_short_answers,
)
from coordexp.data.samples import EncodedSamples
from coordexp.data.shown import ShownRows
from coordexp.errors import RecordError
from coordexp.swift_bridge.lengths import LengthRule
from coordexp.swift_bridge.template import register_coord_template

SIZES = [(64, 64), (65, 40), (300, 200), (17, 500), (8, 8), (640, 480)]
DESCS = ["cat", "red box", 'a "quoted"\\name', "帆船 ⛵", "café\nbar", "x"]


@pytest.fixture(scope="module", params=["nano", "real_model"])
def template(request: pytest.FixtureRequest) -> Any:
    register_coord_template()
    folder = request.getfixturevalue(request.param)
    _, processor = get_model_processor(str(folder), model_type="qwen3_vl", load_model=False)
    template = get_template(processor)
    template.set_mode("train")
    return template


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 records with pictures of all sizes, of 0 to 14 objects of both kinds."""
    folder, draws = tmp_path_factory.mktemp("lengths"), random.Random(0)
    for width, height in SIZES:
        Image.new("RGB", (width, height), (9, 99, 199)).save(folder / f"{width}.png")
    lines = []
    for index in range(30):
        width, height = SIZES[index % len(SIZES)]
        objects = []
        for _ in range(draws.randrange(15)):
            x, y = draws.randrange(900), draws.randrange(900)
            is_box = draws.random() < 0.7
            geometry = {"bbox_2d": [x, y, x + 9, y + 99]} if is_box else {"poly": [x, y, x + 5, y, x, y + 7]}
            objects.append({"desc": draws.choice(DESCS), **geometry})
        record = {"images": [f"{width}.png"], "width": width, "height": height, "objects": objects}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    (folder / "d.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "d.jsonl"


def encoded_lengths(rows: Any, template: Any) -> list[int]:
    return [len(template.encode(row)["input_ids"]) for row in rows]


@pytest.mark.parametrize("field_order", ["desc_first", "geometry_first"])
@pytest.mark.parametrize("max_pixels", [None, 20_000])
def test_told_lengths_are_those_of_encoded_samples(
    template: Any, data: Path, field_order: str, max_pixels: int | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(template, "max_pixels", max_pixels)
    rows = read_training_rows(data, Prompt(user="Detect 帆.", object_field_order=field_order))
    told = sample_lengths(rows, template)
    assert told.tolist() == encoded_lengths(rows, template)
    assert EncodedSamples(ShownRows(rows), template)["lengths"] == told.tolist()


def test_questions_that_name_classes_count_each_for_itself(template: Any, data: Path):
    """Lists of 1 to 30 names: told lengths are those of encoded samples, and no bound is below."""
    names = [*DESCS, *(f"name {n}" for n in range(24))]
    lists = [names[: 6 + 2 * n] for n in range(30)]
    lines = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    written = [{**line, "classes": classes} for line, classes in zip(lines, lists, strict=True)]
    file = data.with_name("asked.jsonl")
    file.write_text("".join(json.dumps(line) + "\n" for line in written), encoding="utf-8")
    rows = read_training_rows(file, Prompt(user="Only {classes}.", system="Be brief."))
    told = sample_lengths(rows, template)
    assert told.tolist() == encoded_lengths(rows, template)
    rule = module._rule(rows, template)
    assert rule is not None
    assert (most_tokens(rows, rule) >= told).all()


@pytest.mark.parametrize("form", ["coordjson", "qwen"])
def test_the_bound_is_never_below(template: Any, data: Path, form: Any):
    rows = read_training_rows(data, Prompt(user="Detect.", answer_form=form))
    rule = module._rule(rows, template)
    assert rule is not None
    bound, told = most_tokens(rows, rule), sample_lengths(rows, template)
    assert (bound >= told).all()
    without_objects = rows.with_format("numpy")["num_coords"][:] == 0
    assert (bound - told)[without_objects].max() < 24


def test_they_are_counted_once(template: Any, data: Path, monkeypatch: pytest.MonkeyPatch):
    rows = read_training_rows(data, Prompt(user="Detect.")).shuffle(seed=5)
    first = np.array(sample_lengths(rows, template))
    monkeypatch.setattr(module, "_count", None)
    again = read_training_rows(data, Prompt(user="Detect.")).shuffle(seed=5)
    assert sample_lengths(again, template).tolist() == first.tolist()
    with pytest.raises(TypeError):
        sample_lengths(read_training_rows(data, Prompt(user="Detect all.")), template)


def test_many_processes_count_as_one_does(template: Any, data: Path, monkeypatch: pytest.MonkeyPatch):
    rows = read_training_rows(data, Prompt(user="Detect."))
    rule = module._rule(rows, template)
    alone = module._count(rows, range(30), rule, template)
    monkeypatch.setattr(module, "_CHUNK", 4)
    monkeypatch.setattr(module, "usable_cores", lambda: 2)
    assert module._count(rows, range(30), rule, template).tolist() == alone.tolist()
    assert module._count(rows, [3, 20], None, template).tolist() == alone[[3, 20]].tolist()


def test_samples_that_are_too_long_are_named_before_training(
    template: Any, data: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = read_training_rows(data, Prompt(user="Detect."))
    lengths = sample_lengths(rows, template)
    longest = np.sort(lengths)[::-1]
    limit = int(longest[3])
    wanted = {index: length for index, length in enumerate(lengths.tolist()) if length > limit}
    assert longer_than(rows, template, limit) == wanted
    monkeypatch.setattr(template, "max_length", limit)
    with pytest.raises(RecordError) as caught:
        check_lengths(rows, template)
    index, length = next(iter(wanted.items()))
    message = str(caught.value)
    assert message.startswith(
        f"3 of 30 samples are longer than {limit} tokens: {data}:{index + 1} has {length} ("
    )
    rest = f" to {longest[0]}, or give these records fewer objects or smaller pictures."
    assert f". Raise global_max_length (max_length in ms-swift's flat form){rest}" in message
    monkeypatch.setattr(template, "max_length", int(longest[0]))
    check_lengths(rows, template)
    with pytest.raises(RecordError, match=rf"^1 of 30 samples are longer than {longest[1]} tokens") as caught:
        check_lengths(rows, template, packing_length=int(longest[1]))
    assert f". Raise rollout_matching.packing_length{rest}" in str(caught.value)


def test_only_samples_in_doubt_are_counted(template: Any, data: Path, monkeypatch: pytest.MonkeyPatch):
    rows = read_training_rows(data, Prompt(user="Detect."))
    counted: list[int] = []
    count = module._count
    monkeypatch.setattr(
        module, "_count", lambda rows, indices, *rest: counted.extend(indices) or count(rows, indices, *rest)
    )
    assert longer_than(rows, template, 10**6) == {}
    assert counted == []


def test_a_rule_that_does_not_hold_is_not_used(template: Any, data: Path, monkeypatch: pytest.MonkeyPatch):
    """A template that adds tokens with the answer: lengths are those of the samples, each encoded once."""
    monkeypatch.setattr(LengthRule, "answer_tokens", lambda self, answers: [len(text) for text in answers])
    rows = read_training_rows(data, Prompt(user="Find.")).select(range(6))
    assert sample_lengths(rows, template).tolist() == encoded_lengths(rows, template)


def test_an_answer_limit_below_the_longest_ground_truth_is_told(
    template: Any, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With file and line, and a limit that answers of half as many objects again fit in."""
    rows = read_training_rows(data, Prompt())
    answers = [row["messages"][-1]["content"] for row in rows]
    counted = [
        len(template.tokenizer.encode(f"{text}<|im_end|>", add_special_tokens=False)) for text in answers
    ]
    longest = max(counted)
    with caplog.at_level(logging.WARNING, logger="coordexp"):
        warn_of_short_answers(rows, template.tokenizer, longest)
        assert caplog.messages == []
        warn_of_short_answers(rows, template.tokenizer, longest - 1)
    [said] = caplog.messages
    line = counted.index(longest) + 1
    num_objects = answers[line - 1].count('"desc"')
    assert f"{data}:{line} has {num_objects} objects in {longest} tokens" in said
    assert f"max_new_tokens is {longest - 1}: " in said
    assert f"{max(1024, -(-longest * 3 // 128) * 64)} lets them end." in said
