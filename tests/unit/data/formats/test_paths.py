"""Which format a file or folder has, and where its pictures are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.annotated import SIZE, noise, write

from coordexp.data.formats.paths import guessed_root, picture_path
from coordexp.data.formats.readers.sources import recognised
from coordexp.errors import RecordError
from coordexp.files import is_file


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.json", {"images": [], "annotations": [], "categories": []}, "coco"),
        ("a.json", {"images": [{"id": 1, "coco_url": "http://x/z.jpg"}], "annotations": [], "categories": []}, "lvis"),
        ("a.json", {"shapes": [], "imagePath": "a.png"}, "labelme"),
        ("a.jsonl", {"images": ["a.png"]}, "jsonl"),
        ("sub/_annotations.coco.json", {"images": [], "annotations": [], "categories": []}, "coco"),
        ("annotations/instances_val.json", {"images": [], "annotations": [], "categories": []}, "coco"),
    ],
)  # fmt: skip
def test_files_and_their_folders_are_recognised(tmp_path: Path, name: str, content: Any, kind: str):
    path = write(tmp_path / name, json.dumps(content))
    assert recognised(path) == recognised(tmp_path) == kind


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nothing", r"nothing: cannot be read"),
        (lambda folder: folder, r"holds nothing that looks like one of jsonl, coco"),
        (lambda folder: write(folder / "a.csv", "x"), r"a\.csv: is none of jsonl, coco, .* \(--format\)"),
        (lambda folder: write(folder / "a.json", "[1]"), r"a\.json: is none of"),
        (lambda folder: write(folder / "a.xml", "<x/>"), r"a\.xml: is none of"),
        (lambda folder: write(folder / "a.json", "{"), r"a\.json:1: not valid JSON"),
    ],
)
def test_what_is_none_of_the_formats_is_named(tmp_path: Path, make: Callable[[Path], Path], message: str):
    with pytest.raises(RecordError, match=message):
        recognised(make(tmp_path))


@pytest.mark.parametrize(
    "name", ["../a.png", "x/../../a.png", "/etc/passwd", "..", "x/../../../a", "..\\a.png"]
)
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str):
    root = tmp_path / "root"
    noise(tmp_path / "a.png", SIZE)
    root.mkdir()
    with pytest.raises(
        RecordError, match=r"^here is .*, which leads outside of .*root.*--image-root.*--allow-outside"
    ):
        picture_path(root, name, "here")
    assert picture_path(root, name, "here", allow_outside=True)


@pytest.mark.parametrize(
    "name", ["a.png", "x/../a.png", "./a.png", "x//b.png", "..a.png", "x\\b.png", "\0", "n" * 300]
)
def test_names_that_stay_inside_are_followed(tmp_path: Path, name: str):
    noise(tmp_path / "a.png", SIZE)
    noise(tmp_path / "x" / "b.png", SIZE)
    path = picture_path(tmp_path, name, "here")
    assert is_file(path) == (name in ("a.png", "x/../a.png", "./a.png", "x//b.png", "x\\b.png"))
    absolute = picture_path(tmp_path, str(tmp_path / "a.png"), "here")
    assert absolute == tmp_path / "a.png"  # and inside


def test_accents_may_be_written_the_other_way(tmp_path: Path):
    noise(tmp_path / "cafe\u0301.png", SIZE)
    assert picture_path(tmp_path, "caf\u00e9.png", "here").is_file()


def test_the_folder_of_pictures_is_found_near_the_file(tmp_path: Path):
    noise(tmp_path / "images" / "a.png", SIZE)
    noise(tmp_path / "images" / "b.png", SIZE)
    file = tmp_path / "annotations" / "instances.json"
    assert guessed_root(file, ["a.png", "b.png"]) == tmp_path / "images"
    assert guessed_root(file, ["a.png", "c.png"]) is None
    assert guessed_root(file, []) is None
