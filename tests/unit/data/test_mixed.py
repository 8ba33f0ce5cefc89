"""Rows of several data sets in one run: whose they are, in which order, and how long an epoch is."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from coordexp.config import Prompt
from coordexp.config.run.data_files import expanded
from coordexp.config.schema.augmentation import Augmentation
from coordexp.data.augment.augmenter import Augmenter
from coordexp.data.dataset import RowMaker, record_in
from coordexp.data.mixed import Mixed, MixedOrder, open_mixed
from coordexp.data.shown import ShownRows
from coordexp.data.source import SampleSource
from coordexp.errors import RecordError
from coordexp.swift_bridge.draws import Draw

MAKER = RowMaker(Prompt(user="Detect."), seed=3)


def order_of(sizes: list[int], weights: list[float], **options: object) -> MixedOrder:
    names = tuple(f"d{index}" for index in range(len(sizes)))
    mixed = Mixed(Dataset.from_dict({}), names, tuple(sizes))
    defaults = {"seed": 5, "stopping_strategy": "first_exhausted", "samples_per_epoch": None}
    return MixedOrder.of(mixed, weights, **{**defaults, **options})


def rows_of_run(order: MixedOrder, epochs: int) -> list[int]:
    return [order.at(Draw(index, epoch))[0] for epoch in range(epochs) for index in range(len(order))]


@pytest.mark.parametrize(
    ("options", "length"),
    [
        # 3 to 1 of 9 and 100 samples: A A A B A A A B A A A, and the first has been shown
        ({}, 11),
        # 397 places until the hundredth of the second, which comes fourth of four
        ({"stopping_strategy": "all_exhausted"}, 400),
        ({"samples_per_epoch": 50}, 50),
        ({"multiple_of": 8}, 16),
        ({"samples_per_epoch": 50, "multiple_of": 8}, 56),
    ],
)
def test_length_of_an_epoch(options, length):
    assert len(order_of([9, 100], [3, 1], **options)) == length


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    data=st.data(),
    per_epoch=st.integers(1, 70),
    epochs=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_every_pass_shows_every_row_once_in_an_order_of_its_own(sizes, data, per_epoch, epochs):
    weights = [data.draw(st.integers(1, 20)) for _ in sizes]
    order = order_of(sizes, weights, samples_per_epoch=per_epoch)
    run = rows_of_run(order, epochs)
    assert [row for epoch in range(epochs) for row in order.rows_in(epoch).tolist()] == run
    start = 0
    for index, size in enumerate(sizes):
        own = [row - start for row in run if order.mixed.name_of(row) == f"d{index}"]
        start += size
        assert abs(len(own) - len(run) * weights[index] / sum(weights)) < 1
        passes = [own[first : first + size] for first in range(0, len(own), size)]
        assert all(sorted(whole) == list(range(size)) for whole in passes if len(whole) == size)
        assert all(len(set(part)) == len(part) for part in passes)
        if size >= 20:
            assert all(one != other for one, other in pairwise(passes))
    turns = [order.at(Draw(index, epoch)) for epoch in range(epochs) for index in range(len(order))]
    assert len(set(turns)) == len(turns)  # nothing is augmented twice in the same way


def test_the_order_is_that_of_the_seed_and_of_nothing_else():
    order = order_of([40, 60], [1, 1], samples_per_epoch=64)
    run = rows_of_run(order, 3)
    # whichever process asks, in whichever order, also one that was started later
    again = order_of([40, 60], [1, 1], samples_per_epoch=64)
    backwards = {(epoch, i): again.at(Draw(i, epoch))[0] for epoch in (2, 1, 0) for i in range(63, -1, -1)}
    assert run == [backwards[epoch, i] for epoch in range(3) for i in range(64)]
    assert run != rows_of_run(order_of([40, 60], [1, 1], samples_per_epoch=64, seed=6), 3)
    # a third data set leaves the order inside the others
    more = rows_of_run(order_of([40, 60, 10], [1, 1, 1], samples_per_epoch=64), 3)
    assert [row for row in more if row < 40][:30] == [row for row in run if row < 40][:30]


def test_ranks_share_each_step_whatever_their_number():
    """The sampler deals indices out to ranks in turn, so a step of 8 is the same 8 samples."""
    order = order_of([40, 60], [1, 3], samples_per_epoch=50, multiple_of=8)
    assert len(order) % 8 == 0
    for ranks in (1, 2, 4):
        steps = [
            [index for rank in range(ranks) for index in range(step * 8 + rank, step * 8 + 8, ranks)]
            for step in range(len(order) // 8)
        ]
        assert [sorted(step) for step in steps] == [list(range(s * 8, s * 8 + 8)) for s in range(len(steps))]


def test_files_order_without_shuffling():
    assert rows_of_run(order_of([3, 2], [1, 1], samples_per_epoch=6, shuffled=False), 1) == [0, 3, 1, 4, 2, 3]


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """a/1.jsonl, a/2.jsonl and b.jsonl with 2, 3 and 4 records of one picture."""
    monkeypatch.setenv("COORDEXP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a").mkdir()
    for folder in (tmp_path, tmp_path / "a"):
        Image.new("RGB", (8, 6)).save(folder / "p.png")
    for name, number in (("a/1.jsonl", 2), ("a/2.jsonl", 3), ("b.jsonl", 4)):
        objects = [{"desc": f"{name} {i}", "bbox_2d": [1, 2, 3, 4]} for i in range(number)]
        lines = [{"images": ["p.png"], "width": 8, "height": 6, "objects": [one]} for one in objects]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_shards_are_one_data_set(shards):
    files = {"first": expanded([f"{shards}/a/*.jsonl"]), "second": [f"{shards}/b.jsonl"]}
    mixed = open_mixed(files, MAKER)
    assert mixed.sizes == (5, 4)
    descs = [record_in(row).objects[0].desc for row in mixed.rows]
    assert descs == [
        f"{name} {i}" for name, n in (("a/1.jsonl", 2), ("a/2.jsonl", 3), ("b.jsonl", 4)) for i in range(n)
    ]
    assert [mixed.name_of(row) for row in range(9)] == ["first"] * 5 + ["second"] * 4
    assert open_mixed(files, MAKER, limit=3).sizes == (3, 3)
    (shards / "b.jsonl").write_text('{"images": []}\n')
    with pytest.raises(RecordError, match=r"b\.jsonl:1"):
        open_mixed(files, MAKER)


def test_a_sample_tells_its_data_set(shards):
    mixed = open_mixed({"first": [f"{shards}/a/1.jsonl"], "second": [f"{shards}/b.jsonl"]}, MAKER)
    order = MixedOrder.of(
        mixed, [1, 3], seed=0, stopping_strategy="all_exhausted", samples_per_epoch=None, multiple_of=4
    )
    shown = ShownRows(mixed.rows, order=order, maker=MAKER, part_of=mixed.name_of)
    parts = [SampleSource.of_sample(shown[index].row) for index in range(len(shown))]
    assert Counter(source.part for source in parts) == {"first": 2, "second": 6}
    assert all(("b.jsonl" in source.sample_id) == (source.part == "second") for source in parts)
    assert SampleSource.of_sample(shown.row_at(0)) == parts[0]
    flip = Augmentation.model_validate({"enabled": True, "ops": [{"name": "hflip", "params": {"prob": 1.0}}]})
    augmented = ShownRows(
        mixed.rows, order=order, augmenter=Augmenter(flip, seed=1), maker=MAKER, part_of=mixed.name_of
    )
    assert augmented[0].record.objects[0].bins == (996, 2, 998, 4)
    assert [SampleSource.of_sample(augmented[index].row) for index in range(len(augmented))] == parts


def test_patterns(shards):
    assert expanded([f"{shards}/b.jsonl", f"{shards}/a/*.jsonl", f"{shards}/a/1.jsonl"]) == [
        f"{shards}/b.jsonl", f"{shards}/a/1.jsonl", f"{shards}/a/2.jsonl",
    ]  # fmt: skip
    assert expanded([f"{shards}/none/*.jsonl"]) == [f"{shards}/none/*.jsonl"]
