"""Records -> rows that ms-swift trains on, and the supervised rows of a collated batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from coordexp.config import Prompt
from coordexp.data.batch_meta import META_KEY, BatchMeta
from coordexp.data.collator import with_meta
from coordexp.data.dataset import read_training_rows
from coordexp.errors import ConfigError, RecordError
from coordexp.losses.columns import CoordColumns

OBJECTS = [
    {"desc": "low", "bbox_2d": [5, 60, 9, 70]},
    {"desc": "high", "bbox_2d": [1, 2, 3, 4]},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    record = {"images": ["a.png"], "width": 8, "height": 8, "objects": OBJECTS}
    (tmp_path / "d.jsonl").write_text(
        json.dumps(record) + "\n" + json.dumps({**record, "objects": []}) + "\n"
    )
    return tmp_path / "d.jsonl"


def test_a_row_asks_about_the_image_and_answers_in_coordjson(data: Path):
    full, empty = read_training_rows(data, Prompt(user="Find all."))
    assert full["images"] == [str(data.parent / "a.png")]
    assert full["messages"] == [
        {"role": "user", "content": "<image>Find all."},
        {
            "role": "assistant",
            "content": '{"objects": ['
            '{"desc": "high", "bbox_2d": [<|coord_1|>, <|coord_2|>, <|coord_3|>, <|coord_4|>]}, '
            '{"desc": "low", "bbox_2d": [<|coord_5|>, <|coord_60|>, <|coord_9|>, <|coord_70|>]}]}',
        },
    ]
    assert empty["messages"][1]["content"] == '{"objects": []}'


def test_a_row_asks_for_the_classes_of_its_record(data: Path):
    """Where the prompt has a place for them; a prompt without one asks every record alike."""
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    lists = [["high", "low", "other"], ["none of them"]]
    written = [json.dumps({**line, "classes": names}) for line, names in zip(lines, lists, strict=True)]
    data.write_text("\n".join(written))

    def asked(user: str) -> list[str]:
        return [row["messages"][0]["content"] for row in read_training_rows(data, Prompt(user=user))]

    assert asked("Find {classes}!") == ["<image>Find high, low, other!", "<image>Find none of them!"]
    assert asked("Find all.") == ["<image>Find all."] * 2
    data.write_text("\n".join([written[0], json.dumps(lines[1])]))
    with pytest.raises(
        RecordError, match=r"d.jsonl:2: names no classes, and the prompt has a place for them"
    ):
        asked("Find {classes}!")


@pytest.mark.parametrize(
    ("form", "answers"),
    [
        (
            "coordjson_numbers",
            ('{"objects": [{"desc": "high", "bbox_2d": [1, 2, 3, 4]}, {"desc": "low", "bbox_2d": [5, 60, 9, 70]}]}',
             '{"objects": []}'),
        ),
        ("qwen", ('[{"bbox_2d": [1, 2, 3, 4], "label": "high"}, {"bbox_2d": [5, 60, 9, 70], "label": "low"}]', "[]")),
        (
            "compact",
            ("[\nhigh<|coord_1|><|coord_2|><|coord_3|><|coord_4|>\nlow<|coord_5|><|coord_60|><|coord_9|><|coord_70|>]",
             "[\n]"),
        ),
    ],
)  # fmt: skip
def test_answers_in_other_forms(data: Path, form: Any, answers: tuple[str, str]):
    rows = read_training_rows(data, Prompt(user="p", answer_form=form))
    assert tuple(row["messages"][1]["content"] for row in rows) == answers


def test_geometry_first(data: Path):
    row = read_training_rows(data, Prompt(user="p", object_field_order="geometry_first"))[0]
    answer = row["messages"][1]["content"]
    assert answer.startswith('{"objects": [{"bbox_2d": [<|coord_1|>, ')
    assert answer.endswith('<|coord_70|>], "desc": "low"}]}')


def test_random_order_depends_on_seed_and_line_only(data: Path):
    def order(seed: int) -> bool:
        row = read_training_rows(data, Prompt(user="p", object_ordering="random"), seed=seed)[0]
        answer = row["messages"][1]["content"]
        return answer.index("low") < answer.index("high")

    orders = [order(seed) for seed in range(20)]
    assert orders == [order(seed) for seed in range(20)]
    assert set(orders) == {True, False}


def test_an_empty_file_is_refused(tmp_path: Path):
    (tmp_path / "d.jsonl").write_text("\n")
    with pytest.raises(RecordError, match="holds no record"):
        read_training_rows(tmp_path / "d.jsonl", Prompt(user="p"))


COLUMNS = CoordColumns([20, 21, 22])


def collate(features):
    return {"labels": torch.tensor([feature["labels"] for feature in features])}


def test_rows_are_shifted_split_by_kind_and_counted():
    # Row t predicts token t + 1: text targets 7 and 8, coordinate targets 21 (bin 1) and 20 (bin 0).
    features = [{"labels": [-100, -100, 7, 21]}, {"labels": [5, 20, 8, -100]}]
    batch = with_meta(collate, COLUMNS)(features)
    meta = BatchMeta.take(batch)
    rows, num_samples = meta.rows, meta.num_samples
    assert META_KEY not in batch
    assert num_samples == 2
    assert rows.num_text == 2
    assert rows.positions_R.tolist() == [1, 5, 2, 4]
    assert rows.targets_R.tolist() == [7, 8, 21, 20]
    assert rows.bins_N.tolist() == [1, 0]


def test_a_batch_without_labels_is_refused():
    with pytest.raises(ConfigError, match="no labels"):
        with_meta(lambda _features: {"input_ids": 1}, COLUMNS)([])
