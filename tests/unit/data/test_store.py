"""Records on disk: what is read comes back, errors name lines, one process checks and the others map."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from coordexp.codec.records import Record, iter_jsonl
from coordexp.codec.schema import BoxObject
from coordexp.config import Prompt
from coordexp.data.dataset import RowMaker, read_training_rows, record_in
from coordexp.data.store import open as opened
from coordexp.data.store.check import check_chunk, checked_chunks, chunks_of
from coordexp.data.store.columns import batch_of, record_from_text, record_of, record_text
from coordexp.data.store.open import FACTS_FILE, open_records
from coordexp.errors import RecordError

OBJECTS = [
    {"desc": "cat", "bbox_2d": [1, 2, 30, 40]},
    {"desc": "Segel 帆", "poly": [0, 0, 5, 9, 7, 2], "poly_points": 3},
]


def write(folder: Path, num_records: int, *, name: str = "d.jsonl", **changes: object) -> Path:
    """A data file of one picture; record k has k % 3 objects."""
    folder.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", (8, 6)).save(folder / "a.png")
    lines = []
    for index in range(num_records):
        record = {"images": ["a.png"], "width": 8, "height": 6, "objects": OBJECTS[: index % 3]}
        lines.append(
            json.dumps({**record, "metadata": {"image_id": index}, **changes}, ensure_ascii=False) + "\n"
        )
    (folder / name).write_text("".join(lines), encoding="utf-8")
    return folder / name


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COORDEXP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


objects = st.builds(
    BoxObject,
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    st.just("bbox_2d"),
    st.tuples(*[st.integers(0, 999)] * 4),
) | st.builds(
    BoxObject,
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    st.just("poly"),
    st.lists(st.integers(0, 999), min_size=6, max_size=10).map(tuple),
)
records = st.builds(
    Record,
    images=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1).map(tuple),
    width=st.integers(1, 2**31 - 1),
    height=st.integers(1, 2**31 - 1),
    objects=st.lists(objects, max_size=4).map(tuple),
    summary=st.none() | st.text(st.characters(exclude_categories=["Cs"])),
    metadata=st.none() | st.dictionaries(st.text(), st.none() | st.integers() | st.lists(st.text())),
    file=st.just("/data/d.jsonl"),
    line=st.integers(1, 2**40),
)


@given(records)
def test_a_record_comes_back_as_it_was(record: Record):
    (row,) = batch_of([record], ["coco"]).to_pylist()
    assert record_of(row) == record
    assert row["dataset"] == "coco"
    assert record_from_text(record_text(record)) == record


def test_a_file_is_read_as_line_by_line(tmp_path: Path):
    file = write(tmp_path / "coco", 50)
    store = open_records(file)
    assert [record_of(row) for row in store.table] == list(iter_jsonl(file))
    assert store.datasets == {"coco": 50}
    table = store.table.with_format("numpy")
    assert table["num_coords"][:6].tolist() == [0, 4, 10] * 2
    assert table["desc_bytes"][:3].tolist() == [0, len('"cat"'), len('"cat"') + len('"Segel 帆"'.encode())]


@pytest.mark.parametrize("end", ["\n", "", "\n\n\n", "\r\n"])
@pytest.mark.parametrize("chunk_bytes", [1, 7, 100, 333, 10**6])
def test_chunks_are_all_lines_once_with_their_numbers(tmp_path: Path, chunk_bytes: int, end: str):
    file = tmp_path / "d.txt"
    lines = [f"{'x' * (17 * index % 90)} {index + 1}" for index in range(40)]
    file.write_bytes(("\n".join(lines) + end).encode())
    found = []
    for chunk in chunks_of(file, chunk_bytes):
        content = file.read_bytes()[chunk.start : chunk.stop]
        assert content
        found += [(chunk.first_line + index, line) for index, line in enumerate(content.splitlines())]
    wanted = enumerate(file.read_bytes().splitlines(), start=1)
    assert found == list(wanted)


def test_processes_give_what_one_gives_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write(tmp_path / "d", 300)
    monkeypatch.setattr(
        "coordexp.data.store.check.chunks_of", lambda path: chunks_of(path, 2000), raising=True
    )
    alone, together = (
        b"".join(checked.batch for checked in checked_chunks(file, cores=cores)) for cores in (1, 3)
    )
    assert alone == together
    assert len(list(chunks_of(file, 2000))) > 5


def test_the_first_bad_line_of_the_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write(tmp_path / "d", 300)
    lines = file.read_text().splitlines()
    lines[250] = lines[250].replace('"width": 8', '"width": 9')
    lines[120] = '{"images": ["gone.png"], "width": 8, "height": 6, "objects": []}'
    file.write_text("\n".join(lines))
    monkeypatch.setattr("coordexp.data.store.check.chunks_of", lambda path: chunks_of(path, 2000))
    for cores in (1, 3):
        with pytest.raises(RecordError) as caught:
            open_records(file, cores=cores)
        assert str(caught.value).startswith(f"{file}:121: image {file.parent / 'gone.png'} does not exist")
    assert not list(file.parents[1].glob("cache/records/*/*/facts.json"))


def test_a_file_is_checked_once_until_it_changes(tmp_path: Path):
    file = write(tmp_path / "d", 5)
    first = open_records(file)
    (tmp_path / "d" / "a.png").unlink()  # would be found by a second check
    assert open_records(file).folder == first.folder
    os.utime(file, ns=(1, 1))
    with pytest.raises(RecordError, match=r"d\.jsonl:1: image .* does not exist"):
        open_records(file)
    changed = write(tmp_path / "d", 6)
    assert len(open_records(changed).table) == 6


def test_other_checking_code_checks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write(tmp_path / "d", 5)
    first = open_records(file).folder
    monkeypatch.setattr(opened, "_code_hash", lambda: "newer")
    assert open_records(file).folder != first


def test_versions_that_nobody_opens_are_removed(tmp_path: Path):
    folders = [open_records(write(tmp_path / "d", number)).folder for number in (5, 6)]
    old = time.time() - 40 * 86400
    os.utime(folders[0], (old, old))
    third = open_records(write(tmp_path / "d", 7)).folder
    assert [folder.exists() for folder in (*folders, third)] == [False, True, True]


def test_a_crash_leaves_nothing_that_is_taken_for_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write(tmp_path / "d", 5)

    def crash(chunk):
        raise KeyboardInterrupt

    monkeypatch.setattr("coordexp.data.store.check.check_chunk", crash)
    with pytest.raises(KeyboardInterrupt):
        open_records(file)
    monkeypatch.setattr("coordexp.data.store.check.check_chunk", check_chunk)
    assert len(open_records(file).table) == 5


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write(tmp_path / "d", 5)

    def grow(chunk):
        checked = check_chunk(chunk)
        with file.open("a") as stream:
            stream.write("\n")
        return checked

    monkeypatch.setattr("coordexp.data.store.check.check_chunk", grow)
    with pytest.raises(RecordError, match="changed while it was read"):
        open_records(file)


def test_no_record_and_no_file(tmp_path: Path):
    with pytest.raises(RecordError, match=r"gone\.jsonl: cannot be read \(No such file"):
        open_records(tmp_path / "gone.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(RecordError, match="holds no record"):
        open_records(tmp_path / "empty.jsonl")


def _open_and_tell(file: str, answers: multiprocessing.Queue) -> None:
    store = open_records(file)
    facts = json.loads((store.folder / FACTS_FILE).read_text())
    answers.put((len(store.table), facts["checked_by"]))


def test_of_several_processes_one_checks(tmp_path: Path):
    file = write(tmp_path / "d", 400)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=_open_and_tell, args=(str(file), answers)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert {number for number, _ in found} == {400}
    assert len({pid for _, pid in found}) == 1
    assert len(list((tmp_path / "cache" / "records").glob("*/*/facts.json"))) == 1


def test_rows_are_sent_to_workers_as_a_path(tmp_path: Path):
    rows = read_training_rows(write(tmp_path / "d", 2000), Prompt(user="p"))
    sent = pickle.dumps(rows)
    assert len(sent) < 20_000
    assert pickle.loads(sent)[1999] == rows[1999]


def test_a_row_carries_its_record(tmp_path: Path):
    file = write(tmp_path / "d", 3)
    maker = RowMaker(Prompt(user="p", object_ordering="random"), seed=3)
    rows = open_records(file).table.with_transform(maker)
    for row, record in zip(rows, iter_jsonl(file), strict=True):
        assert record_in(row) == maker.ordered(record)


def test_columns_can_be_read_without_making_rows(tmp_path: Path):
    rows = read_training_rows(write(tmp_path / "d", 9), Prompt(user="p"))
    shuffled = rows.shuffle(seed=1)
    lines = shuffled.with_format("numpy")["line"][:]
    assert sorted(lines.tolist()) == list(range(1, 10))
    assert np.array_equal(lines, [record_in(row).line for row in shuffled])
