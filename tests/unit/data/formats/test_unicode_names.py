"""One name in two Unicode forms is one class, whoever wrote the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.annotated import noise, objects_of

from coordexp.data.check.source import Source
from coordexp.data.formats.exports.yolo import class_numbers, export_yolo
from coordexp.data.formats.options import ImportOptions
from coordexp.data.formats.readers.sources import read_sources

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"
SHAPE = '{{"label": "{}", "shape_type": "rectangle", "points": [[10, 10], [20, 20]], "flags": {{}}, "group_id": null}}'
OBJECT = "<object><name>{}</name><bndbox><xmin>11</xmin><ymin>11</ymin><xmax>20</xmax><ymax>20</ymax></bndbox></object>"


def labelme(folder: Path) -> None:
    shapes = ", ".join(SHAPE.format(name) for name in (COMPOSED, DECOMPOSED))
    text = f'{{"shapes": [{shapes}], "imagePath": "a.png", "imageWidth": 40, "imageHeight": 30, "imageData": null}}'
    (folder / "a.json").write_text(text, encoding="utf-8")


def voc(folder: Path) -> None:
    objects = "".join(OBJECT.format(name) for name in (COMPOSED, DECOMPOSED))
    size = "<size><width>40</width><height>30</height><depth>3</depth></size>"
    text = f"<annotation><filename>a.png</filename>{size}{objects}</annotation>"
    (folder / "a.xml").write_text(text, encoding="utf-8")


def read(folder: Path) -> Source:
    [source] = read_sources(folder, ImportOptions(find_pictures=True))
    return source


@pytest.mark.parametrize("written_by", [labelme, voc])
def test_two_forms_are_one_class(tmp_path: Path, written_by: Callable[[Path], None]) -> None:
    noise(tmp_path / "a.png", (40, 30))
    written_by(tmp_path)
    source = read(tmp_path)
    assert source.dataset.category_names == [COMPOSED]
    assert source.dataset.category_M.tolist() == [0, 0]


def test_given_classes_may_be_decomposed(tmp_path: Path) -> None:
    noise(tmp_path / "a.png", (40, 30))
    voc(tmp_path)
    source = read(tmp_path)
    assert class_numbers([source], ["x", DECOMPOSED]) == {"x": 0, COMPOSED: 1}
    export_yolo([source], tmp_path / "out", names=["x", DECOMPOSED], pictures="copy")
    [objects] = objects_of(read(tmp_path / "out"))
    assert [name for name, _ in objects] == [COMPOSED, COMPOSED]
