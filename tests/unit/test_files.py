"""Files appear complete or not at all; JSON is strict and keeps every character."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given
from hypothesis import strategies as st

from coordexp.errors import ConfigError, ContractError, RecordError
from coordexp.files import (
    append_jsonl,
    atomic_file,
    atomic_folder,
    atomic_link,
    folder_lock,
    json_line,
    log_tail,
    read_json,
    read_jsonl,
    while_uploaded,
    write_json,
    write_jsonl,
    write_large_json,
    write_text,
)

PACKAGE = Path(__file__).resolve().parents[2] / "coordexp"
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_an_error_in_the_block_keeps_the_old_content_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    write_text(path, "old")

    def write_half() -> None:
        with atomic_file(path) as stream:
            stream.write("half of the new")
            assert path.read_text() == "old"
            stream.write(str(1 / 0))

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["page.html"]


def test_a_killed_writer_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "stats.json"
    write_json(path, {"step": 1})
    program = (
        "import os, signal, sys; from coordexp.files import atomic_file\n"
        "with atomic_file(sys.argv[1]) as stream:\n"
        "    stream.write('{\"step\": '); stream.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert read_json(path) == {"step": 1}


def test_a_reader_and_many_writers_never_meet_half_a_file(tmp_path: Path) -> None:
    path, broken, stop = tmp_path / "stats.json", [], threading.Event()
    write_json(path, {"value": 0, "filler": []}, sync=False)

    def read() -> None:
        while not stop.is_set():
            try:
                content = read_json(path)
                assert len(content["filler"]) == content["value"]
            except (RecordError, AssertionError) as error:
                broken.append(error)

    def write() -> None:
        for size in range(150):
            write_json(path, {"value": size, "filler": ["x" * 50] * size}, sync=False)

    reader, writers = threading.Thread(target=read), [threading.Thread(target=write) for _ in range(2)]
    for thread in (reader, *writers):
        thread.start()
    for writer in writers:
        writer.join()
    stop.set()
    reader.join()
    assert not broken
    assert os.listdir(tmp_path) == ["stats.json"]


def test_a_new_file_has_the_mode_of_an_ordinary_one(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_text(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"file/page\.html: cannot be written \(.*\)\. Choose another place"
    ):
        write_text(tmp_path / "file" / "page.html", "")


def test_a_folder_is_swapped_when_it_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "step_1"
    with atomic_folder(folder) as unfinished:
        write_text(unfinished / "old.txt", "old")
    with pytest.raises(ZeroDivisionError), atomic_folder(folder, replace=True) as unfinished:
        write_text(unfinished / "new.txt", str(1 / 0))
    assert os.listdir(folder) == ["old.txt"]
    with atomic_folder(folder, replace=True) as unfinished:
        write_text(unfinished / "new.txt", "new")
        assert os.listdir(folder) == ["old.txt"]
    assert os.listdir(folder) == ["new.txt"]
    assert os.listdir(tmp_path) == ["step_1"]


def test_a_link_is_made_and_moved(tmp_path: Path) -> None:
    for target in ("checkpoint-1", "checkpoint-2"):
        atomic_link(tmp_path / "best", target)
        assert os.readlink(tmp_path / "best") == target
    assert os.listdir(tmp_path) == ["best"]


def test_an_upload_of_a_folder_leaves_out_what_is_being_written_in_it(tmp_path: Path) -> None:
    """By the patterns that the HF Trainer uploads a run with."""
    run, beside = tmp_path / "run", tmp_path / "other"
    (run / "ranks").mkdir(parents=True)
    while_uploaded(run)

    def uploaded() -> set[str]:
        found = (path.relative_to(run).as_posix() for path in run.glob("**/*") if path.is_file())
        return set(filter_repo_objects(found, ignore_patterns=["_*", "checkpoint-*"]))

    for name in ("top.json", "ranks/rank_0.json", "dumps/step_3/sample.md"):
        before = uploaded()
        with atomic_file(run / name) as stream:
            stream.write("{}")
            assert uploaded() == before
        assert uploaded() == before | {name}
    with atomic_folder(run / "dumps" / "whole") as folder:
        write_text(folder / "page.md", "told")
        assert "page.md" not in str(uploaded())
    assert "dumps/whole/page.md" in uploaded()
    with atomic_file(beside / "file.json"):
        assert [path.name[:11] for path in beside.iterdir()] == [".file.json."]
    beside_linked = run / "linked"
    beside_linked.symlink_to(beside)
    with atomic_file(beside_linked / "far.json"):  # a rename reaches no other disk
        assert sorted(path.name[:10] for path in beside.iterdir()) == [".far.json.", "file.json"]


@given(rows=st.lists(JSON_VALUES, max_size=4))
def test_json_lines_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[object]) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_jsonl(path, rows)
    assert list(read_jsonl(path)) == list(enumerate(rows, start=1))
    assert path.read_bytes() == b"".join(map(json_line, rows))


def test_characters_are_kept_and_half_a_surrogate_pair_is_written_as_an_escape(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"desc": "café\u2028猫"}, indent=None)
    assert (tmp_path / "a.json").read_bytes() == '{"desc": "café\u2028猫"}\n'.encode()
    write_jsonl(tmp_path / "b.jsonl", ["\ud83d", "é"])
    assert (tmp_path / "b.jsonl").read_bytes() == '"\\ud83d"\n"é"\n'.encode()
    assert [value for _, value in read_jsonl(tmp_path / "b.jsonl")] == ["\ud83d", "é"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"bytes"], ids=str)
def test_what_json_does_not_have_is_refused_and_the_old_file_stays(tmp_path: Path, value: object) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, 1)
    for write in (lambda: write_json(path, [value]), lambda: write_jsonl(path, [0, value])):
        with pytest.raises(ContractError, match=r"metrics\.json: cannot be written as JSON"):
            write()
    assert read_json(path) == 1


def test_appended_lines_stand_beside_those_of_other_processes(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    threads = [
        threading.Thread(target=lambda: [append_jsonl(path, "x" * 200) for _ in range(100)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [value for _, value in read_jsonl(path)] == ["x" * 200] * 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n "a": 1,\n}', r"f\.json:3: not valid JSON \(.* at column 1\)"),
        (b"[1, NaN]", r"f\.json: not valid JSON \(holds NaN, which is not JSON\)"),
        (b'["caf\xe9"]', r"f\.json: is not UTF-8 \(.* at byte 5\)"),
        (b"[" * 100_000, r"f\.json: is nested too deeply to be read"),
        (b"9" * 5000, r"f\.json: not valid JSON \(.*digits"),
        (b"", r"f\.json:1: not valid JSON"),
        (None, r"f\.json: cannot be read \(No such file"),
    ],
    ids=["comma before a brace", "NaN", "latin-1", "100,000 brackets", "5000 digits", "empty", "missing"],
)
def test_broken_json_is_one_sentence_naming_the_place(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "f.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecordError, match=message):
        read_json(path)
    with pytest.raises(ConfigError, match=message):
        read_json(path, error=ConfigError)


def test_large_json_is_one_line_of_the_same_values(tmp_path: Path) -> None:
    value = {"images": [{"id": 1, "desc": "caf\u00e9", "bbox": [0.1, 2, 1e-7]}], "none": None}
    write_large_json(tmp_path / "v.json", value)
    assert read_json(tmp_path / "v.json") == value
    assert (tmp_path / "v.json").read_bytes().count(b"\n") == 1


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert list(read_jsonl(tmp_path / "a.json")) == [(1, {"a": 1})]


def test_a_reader_that_checks_numbers_itself_may_let_nan_pass(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"score": NaN, "x": -Infinity}')
    assert str(read_json(tmp_path / "a.json", allow_nan=True)) == "{'score': nan, 'x': -inf}"


def test_broken_lines_are_named_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'1\n{"torn\n3\n{"torn')
    with pytest.raises(RecordError, match=r"log\.jsonl:2: not valid JSON"):
        list(read_jsonl(path))
    assert list(read_jsonl(path, skip_broken=True)) == [(1, 1), (3, 3)]


def test_a_lock_is_refused_or_waited_for_and_ends_with_its_holder(tmp_path: Path) -> None:
    def refuse() -> None:
        raise ConfigError("busy")

    with folder_lock(tmp_path / "new", ".lock", busy=refuse):
        with pytest.raises(ConfigError, match="busy"), folder_lock(tmp_path / "new", ".lock", busy=refuse):
            pass
        took: list[str] = []
        told = threading.Event()

        def wait() -> None:
            with folder_lock(tmp_path / "new", ".lock", busy=told.set):
                took.append("second")

        second = threading.Thread(target=wait)
        second.start()
        assert told.wait(10)
        assert not took
    second.join(10)
    assert took == ["second"]


def test_the_tail_of_a_log_has_no_bars_and_no_endless_lines(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"first\n0%|\r50%|\rdone \n\n\xff" + b"x" * 600 + b"\nlast\n")
    assert log_tail(tmp_path / "log", 3).split("\n") == ["done", "\ufffd" + "x" * 499 + " ...", "last"]


APPENDING = {
    "eval/predictions/log.py",
    "inference/teacher_forced.py",
    "stages/processes.py",
    "study/processes.py",
    "cli/demo/demo_cmd.py",
    "audit/subject.py",
    "inference/detect/kept_answers.py",
    "machine/gather/answers.py",
    "machine/gather/places.py",
}
"""Files that write a stream as it comes: the answers of a run, the output of a process, bytes that are timed."""


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_nobody_else_writes_files(path: Path) -> None:
    """A call that would put text or bytes under a name in another way than `coordexp.files`."""
    if path == PACKAGE / "files.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called.rsplit(".", 1)[-1] not in {"write_bytes", "mkstemp", "NamedTemporaryFile"}, called
        assert called not in {"os.replace", "os.rename", "json.dump"}, called
        assert not called.endswith(".write_text"), called
        mode = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        if called.rsplit(".", 1)[-1] == "open" and {"w", "wb", "a", "ab", "x", "xb"} & set(map(str, mode)):
            assert str(path.relative_to(PACKAGE)) in APPENDING, f"{path}:{node.lineno}"


def test_written_json_is_what_the_standard_library_writes(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": "é"}
    write_json(tmp_path / "v.json", value, sort_keys=True)
    expected = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert (tmp_path / "v.json").read_text(encoding="utf-8") == expected


def test_a_large_file_holds_whole_numbers_of_any_size(tmp_path: Path):
    value = [{"id": 2**64, "n": -(2**80), "k": 1}, {"id": 2**63}]
    write_large_json(tmp_path / "v.json", value)
    assert json.loads((tmp_path / "v.json").read_text()) == value


def test_a_key_that_is_written_twice_is_refused(tmp_path: Path):
    path = tmp_path / "gt.json"
    path.write_text('{"images": [], "annotations": [{"bbox": [1], "id": 1, "bbox": [2]}]}')
    with pytest.raises(
        RecordError, match=r"gt\.json: not valid JSON \(the key 'bbox' stands in one object twice\)"
    ):
        read_json(path)
