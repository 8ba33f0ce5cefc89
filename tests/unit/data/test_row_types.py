"""Token types of supervised rows: by hand, padded as packed, by dataset; and where a sample says it came from."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "fixtures" / "codec"))

from codec_tokenizers import make_demo

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.codec.records import dataset_name, parse_record
from coordexp.codec.token_types import TokenType
from coordexp.config import Prompt
from coordexp.data.batch_meta import BatchMeta
from coordexp.data.collator import with_meta
from coordexp.data.dataset import read_training_rows
from coordexp.data.row_types import RowTyper
from coordexp.data.source import DatasetFilter, SampleSource
from coordexp.errors import RecordError
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import SupervisedRows

ANSWERS = {
    "lvis": '{"objects": [{"desc": "red box", "bbox_2d": [<|coord_1|>, <|coord_2|>, <|coord_3|>, <|coord_4|>]}]}'
    "<|im_end|>",
    "coco": '{"objects": []}<|im_end|>',
    "LVIS-v1": '{"objects": [{"desc": "猫", "bbox_2d": [<|coord_9|>, <|coord_8|>, <|coord_90|>, <|coord_80|>]}]}'
    "<|im_end|>",
}
EVERY = DatasetFilter(("*",))


@pytest.fixture(scope="module")
def tok():
    return make_demo()


@pytest.fixture(scope="module")
def columns(tok) -> CoordColumns:
    return CoordColumns(CoordVocab.from_tokenizer(tok).ids)


@pytest.fixture
def samples(tok) -> list[dict]:
    """Three encoded samples with prompts of different lengths."""
    made = []
    for number, (dataset, answer) in enumerate(ANSWERS.items()):
        ids = tok.encode(answer, add_special_tokens=False)
        source = SampleSource(dataset, f"{dataset}.jsonl:{number + 1}")
        made.append({"labels": [-100] * (3 + number) + ids, "channel": source.to_text()})
    return made


def pad(samples: list[dict]) -> dict:
    width = max(len(sample["labels"]) for sample in samples)
    return {"labels": torch.tensor([s["labels"] + [-100] * (width - len(s["labels"])) for s in samples])}


def pack(packs: list[list[dict]]) -> dict:
    """One sequence for everything; positions restart with each sample, as in a padding-free batch."""
    flat = [sample for samples in packs for sample in samples]
    positions = torch.cat([torch.arange(len(sample["labels"])) for sample in flat])
    return {
        "labels": torch.tensor([[label for sample in flat for label in sample["labels"]]]),
        "position_ids": positions.expand(4, 1, -1),
    }


def rows_of(collate, features, columns, tok, counts=EVERY) -> tuple[SupervisedRows, dict]:
    batch = with_meta(collate, columns, RowTyper(tok, counts))(features)
    meta = BatchMeta.take(batch)
    rows = meta.rows
    about = {"skipped": meta.types_skipped, "ids": meta.sample_ids, "num_samples": meta.num_samples}
    return rows, about


def typed_targets(rows: SupervisedRows, tok) -> list[tuple[str, TokenType]]:
    """(token, type) of every row, in order of position."""
    order = rows.positions_R.argsort()
    tokens = [tok.decode([token_id]) for token_id in rows.targets_R[order].tolist()]
    return list(zip(tokens, map(TokenType, rows.types_R[order].tolist()), strict=True))


def test_types_of_one_sample_by_hand(samples, columns, tok):
    rows, about = rows_of(pad, samples[:1], columns, tok)
    typed = typed_targets(rows, tok)
    assert "".join(token for token, _ in typed) == ANSWERS["lvis"]
    by_type = {kind: "".join(token for token, of in typed if of == kind) for kind in TokenType}
    assert by_type[TokenType.COORD] == "<|coord_1|><|coord_2|><|coord_3|><|coord_4|>"
    assert by_type[TokenType.EOS] == "<|im_end|>"
    assert by_type[TokenType.DESC] == "red box"
    assert by_type[TokenType.IGNORE] == ""
    assert rows.types_R[: rows.num_text].ne(TokenType.COORD).all()
    assert rows.types_R[rows.num_text :].eq(TokenType.COORD).all()
    assert about == {"skipped": False, "ids": ("lvis.jsonl:1",), "num_samples": 1}


@pytest.mark.parametrize(
    ("collate", "entries"), [(pack, [[0, 1], [2]]), (pack, [[0], [1], [2]]), (pad, [0, 1, 2])]
)
def test_the_first_entries_of_a_batch_are_a_batch_of_them(samples, columns, tok, collate, entries):
    def picked(entry):
        return [samples[i] for i in entry] if isinstance(entry, list) else samples[entry]

    features = [picked(entry) for entry in entries]
    made = with_meta(collate, columns, RowTyper(tok, EVERY))
    meta = BatchMeta.of(made(features))
    assert meta.num_entries == len(features)
    for number in range(1, len(features) + 1):
        kept, keep_R = meta.first(number)
        wanted = BatchMeta.of(made(features[:number]))
        assert typed_targets(kept.rows, tok) == typed_targets(wanted.rows, tok)
        assert (kept.rows.num_text, kept.rows.bins_N.tolist()) == (
            wanted.rows.num_text,
            wanted.rows.bins_N.tolist(),
        )
        assert (kept.sample_ids, kept.num_samples) == (wanted.sample_ids, wanted.num_samples)
        assert int(keep_R.sum()) == kept.rows.num_rows


@pytest.mark.parametrize("packs", [[[0, 1, 2]], [[0, 1], [2]], [[0], [1], [2]]])
def test_packs_and_padded_batches_give_the_same_types(samples, columns, tok, packs):
    padded, _ = rows_of(pad, samples, columns, tok)
    packed, about = rows_of(pack, [[samples[i] for i in one] for one in packs], columns, tok)
    assert typed_targets(packed, tok) == typed_targets(padded, tok)
    assert packed.types_R.tolist() == padded.types_R.tolist()
    assert about == {
        "skipped": False,
        "ids": ("lvis.jsonl:1", "coco.jsonl:2", "LVIS-v1.jsonl:3"),
        "num_samples": 3,
    }


def test_samples_of_other_datasets_are_not_counted(samples, columns, tok):
    def counted(counts: DatasetFilter) -> Counter:
        rows, _ = rows_of(pad, samples, columns, tok, counts)
        of_sample = rows.positions_R // max(len(sample["labels"]) for sample in samples)
        return Counter(of_sample[rows.types_R != TokenType.IGNORE].tolist())

    sizes = {i: sum(label != -100 for label in sample["labels"]) for i, sample in enumerate(samples)}
    assert counted(EVERY) == sizes
    assert counted(DatasetFilter(("lvis",))) == {0: sizes[0]}
    assert counted(DatasetFilter(("lvis*",))) == {0: sizes[0], 2: sizes[2]}
    assert counted(DatasetFilter(("*",), ("lvis",))) == {1: sizes[1], 2: sizes[2]}
    assert counted(DatasetFilter(("voc",))) == {}


def test_a_batch_that_does_not_hold_its_samples_labels_stays_untyped(samples, columns, tok):
    def without_last(features):
        batch = pad(features)
        batch["labels"][0, len(features[0]["labels"]) - 1] = -100
        return batch

    def swapped(features):
        return pad(features[::-1])

    for collate in (without_last, swapped):
        rows, about = rows_of(collate, samples, columns, tok)
        assert rows.types_R is None
        assert about["skipped"]
        assert rows.num_rows > 0


def test_without_a_typer_nothing_is_skipped(samples, columns):
    batch = with_meta(pad, columns)(samples)
    assert not BatchMeta.of(batch).types_skipped
    assert BatchMeta.take(batch).rows.types_R is None


def test_samples_from_elsewhere_have_no_name_and_count_with_every_dataset(samples, columns, tok):
    nameless = [{"labels": sample["labels"]} for sample in samples]
    rows, about = rows_of(pad, nameless, columns, tok)
    assert rows.types_R.ne(TokenType.IGNORE).all()
    assert about["ids"] == ("unknown sample",) * 3
    assert rows_of(pad, nameless, columns, tok, DatasetFilter(("lvis",)))[0].types_R.eq(0).all()


class TestSource:
    def test_rows_of_a_file_say_where_they_came_from(self, tmp_path: Path):
        folder = tmp_path / "lvis"
        folder.mkdir()
        Image.new("RGB", (8, 8)).save(folder / "a.png")
        record = {"images": ["a.png"], "width": 8, "height": 8, "objects": []}
        lines = [record, {**record, "metadata": {"dataset": "coco"}}, {**record, "metadata": {"split": "x"}}]
        file = folder / "train.jsonl"
        file.write_text("\n".join(map(json.dumps, lines)))
        found = [SampleSource.of_sample(row) for row in read_training_rows(file, Prompt(user="p"))]
        assert found == [
            SampleSource("lvis", f"{file}:1"),
            SampleSource("coco", f"{file}:2"),
            SampleSource("lvis", f"{file}:3"),
        ]

    @pytest.mark.parametrize("name", [7, "", ["lvis"]])
    def test_a_dataset_that_is_no_name_is_refused(self, name):
        record = parse_record(
            {"images": ["a"], "width": 1, "height": 1, "objects": [], "metadata": {"dataset": name}},
            file="d.jsonl",
            line=3,
        )
        with pytest.raises(RecordError, match=r"^d\.jsonl:3: metadata\.dataset is "):
            dataset_name(record)


class TestDatasetFilter:
    @pytest.mark.parametrize(
        ("include", "exclude", "counted"),
        [
            (["lvis"], [], ["lvis", "LVIS"]),
            (["LVIS*"], [], ["lvis", "LVIS", "lvis_v1"]),
            (["*"], ["lvis"], ["lvis_v1", "coco", ""]),
            ([], [], []),
        ],
    )
    def test_names_and_patterns(self, include, exclude, counted):
        counts = DatasetFilter(tuple(include), tuple(exclude))
        assert list(filter(counts, ["lvis", "LVIS", "lvis_v1", "coco", ""])) == counted

    def test_complaint_names_what_was_found(self):
        counts = DatasetFilter(("lvis",))
        assert counts.complaint({"coco", "lvis"}) is None
        assert counts.complaint({"scenes", ""}) == (
            "no sample belongs to a dataset that counts: datasets found: (no name), scenes; include: ['lvis'], "
            "exclude: []. Write one of these names, or include: ['*'] for all."
        )


@pytest.mark.parametrize("collate", [pad, lambda samples: pack([samples])], ids=["padded", "packed"])
def test_rows_tell_the_data_set_of_their_sample(samples, columns, collate):
    for sample, part in zip(samples, ("b", "a", "b"), strict=True):
        sample["channel"] = SampleSource("any", "d.jsonl:1", part=part).to_text()
    batch = with_meta(collate, columns, parts=("a", "b"))(samples)
    meta = BatchMeta.take(batch)
    assert (meta.parts, meta.rows.num_parts) == (("b", "a", "b"), 2)
    # every supervised token is the target of one row, in the order of the batch
    counts = [sum(label != -100 for label in sample["labels"]) for sample in samples]
    wanted = [part for part, count in zip((1, 0, 1), counts, strict=True) for _ in range(count)]
    in_order = meta.rows.positions_R.argsort()
    assert meta.rows.parts_R[in_order].tolist() == wanted
    assert meta.rows.targets_R[in_order].tolist() == [i for s in samples for i in s["labels"] if i != -100]


def test_a_sample_of_no_data_set_of_the_mixture_leaves_the_batch_without(samples, columns):
    batch = with_meta(pad, columns, parts=("a", "b"))(samples)
    assert BatchMeta.take(batch).rows.parts_R is None
