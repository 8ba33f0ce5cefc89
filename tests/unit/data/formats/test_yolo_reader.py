"""YOLO folders as tools and people write them: read for what they mean, or named with file and line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.annotated import SIZE, noise, objects_of, read, write

from coordexp.data.formats.options import ImportOptions
from coordexp.data.formats.readers.builder import Faults
from coordexp.data.formats.readers.sources import read_sources
from coordexp.data.formats.readers.yolo import label_file, read_class_names
from coordexp.errors import RecordError


def yolo(
    folder: Path, labels: str, config: str = "path: .\ntrain: images/train\nnames: [cat, dog]\n"
) -> Path:
    noise(folder / "images/train/a.png", SIZE)
    write(folder / "labels/train/a.txt", labels)
    write(folder / "data.yaml", config)
    return folder


@pytest.mark.parametrize(
    ("line", "name", "box"),
    [
        ("0 0.5 0.5 0.2 0.4", "cat", [40, 15, 60, 35]),
        ("1 0.5 0.5 1 1", "dog", [0, 0, 100, 50]),
        ("1.0 .5 .5 .2 .4 0.87", "dog", [40, 15, 60, 35]),  # a class as numpy saves it, and a confidence
        ("1\t0.5  0.5 0.2 4e-1 \r", "dog", [40, 15, 60, 35]),
        ("0 0.1 0.2 0.5 0.2 0.5 0.8", "cat", [10, 10, 50, 40]),  # an outline
        ("0 0.1 0.2 0.5 0.2 0.5 0.8 0.1 0.8", "cat", [10, 10, 50, 40]),
        ("0 0.995 0.5 0.02 0.4", "cat", [98.5, 15, 100.5, 35]),  # half a pixel too far: cut later
    ],
)
def test_yolo_lines(tmp_path: Path, line: str, name: str, box: list[float]):
    [found] = read(yolo(tmp_path, f"\n{line}\n"))
    [[(found_name, found_box)]] = objects_of(found)
    assert (found_name, found_box) == (name, pytest.approx(box))
    assert found.dataset.place(0) == "labels/train/a.txt:2"
    assert (found.dataset.segmentations[0] is None) == (len(line.split()) < 7)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "0 320 240 100 50",
            r"labels/train/a\.txt:1: value is '320': expected a share .*0 to 1\. Are these pixels\?",
        ),
        ("0 0.5 0.5 -0.2 0.4", r"a\.txt:1: value is '-0\.2': expected a share"),
        ("0 0.5 nan 0.2 0.4", r"a\.txt:1: value is 'nan'"),
        ("0 0.5 0,5 0.2 0.4", r"a\.txt:1: value is '0,5'"),
        ("2 0.5 0.5 0.2 0.4", r"a\.txt:1: class is '2': expected a number of one of the 2 classes, 0 to 1"),
        ("cat 0.5 0.5 0.2 0.4", r"a\.txt:1: class is 'cat'"),
        ("0.5 0.5 0.5 0.2 0.4", r"a\.txt:1: class is '0\.5'"),
        (
            "0 0.5 0.5 0.2",
            r"a\.txt:1: has 4 values: expected class, x, y, width, height, or class and an outline",
        ),
        ("0 0.1 0.2 0.5 0.2 0.5 0.8 0.1", r"a\.txt:1: has 8 values"),
    ],
)
def test_a_yolo_line_that_is_none_is_named(tmp_path: Path, line: str, message: str):
    with pytest.raises(RecordError, match=message):
        read(yolo(tmp_path, line))
    faults = Faults(collect=True)
    [found] = read(yolo(tmp_path, f"{line}\n0 0.5 0.5 0.2 0.4\n"), faults)
    assert (len(faults.messages), len(found.dataset)) == (1, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            "names: [cat]\ntrain: ../../elsewhere\n",
            r"data\.yaml: train is '\.\./\.\./elsewhere', which leads outside",
        ),
        (
            "names: [cat]\ntrain: /etc\n",
            r"data\.yaml: train is '/etc', which leads outside of .*--image-root",
        ),
        (
            "names: [cat]\ntrain: nowhere\n",
            r"data\.yaml: train is 'nowhere', and .* is neither a folder nor a file",
        ),
        ("names: [cat]\ntrain: {a: 1}\n", r"data\.yaml: train is \{'a': 1\}: expected a folder of pictures"),
        ("names: 5\ntrain: images\n", r"data\.yaml: names is 5: expected a list of class names"),
        ("names: {a: cat}\ntrain: images\n", r"data\.yaml: names holds 'a': 'cat': expected number: name"),
        (f"names: [cat]\ntrain: {'a' * 5000}\n", "is neither a folder nor a file"),
        (f"names: [cat]\npath: {'a' * 5000}\ntrain: nowhere\n", "is neither a folder nor a file"),
        (f"names: [cat]\ntrain: ../{'a' * 5000}\n", "outside|neither a folder nor a file"),
        ("names: [cat]\nkpt_shape: [17, x]\ntrain: images\n", r"data\.yaml: kpt_shape is \[17, 'x'\]"),
    ],
)
def test_a_yolo_config_that_cannot_be_followed_is_named(tmp_path: Path, config: str, message: str):
    with pytest.raises(RecordError, match=message):
        read(yolo(tmp_path, "0 0.5 0.5 0.2 0.4", config) / "data.yaml")


def test_a_broken_yaml_is_one_sentence(tmp_path: Path):
    path = write(tmp_path / "data.yaml", "names: [cat\ntrain: {")
    with pytest.raises(RecordError, match=r"data\.yaml: is not valid YAML \(.*\)") as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        "train: ../train/images\nval: ../valid/images\nnames: {0: cat, 1: dog}\n",  # as Roboflow writes it
        "path: /content/somewhere/else\ntrain: train/images\nval: [valid/images]\nnames: [cat, dog]\n",
        "train: train.txt\nvalid: valid/images\nnames: [cat, dog]\n",
    ],
)
def test_yolo_layouts_of_other_tools(tmp_path: Path, config: str):
    for split in ("train", "valid"):
        noise(tmp_path / split / "images/a.png", SIZE)
        noise(tmp_path / split / "images/sub/b.png", SIZE)
        write(tmp_path / split / "labels/a.txt", "0 0.5 0.5 0.2 0.4\n")
    write(tmp_path / "train.txt", "./train/images/a.png\ntrain/images/sub/b.png\n")
    write(tmp_path / "data.yaml", config)
    found = read(tmp_path)
    assert [(part.split, len(part.dataset.image_ids), len(part.dataset)) for part in found] == [
        ("train", 2, 1),
        ("val", 2, 1),
    ]
    assert found[0].left_out == {"images_without_label_file": 1}


def test_a_yolo_folder_without_config(tmp_path: Path):
    noise(tmp_path / "one.jpg", SIZE)
    write(tmp_path / "one.txt", "1 0.5 0.5 0.2 0.4\n")
    write(tmp_path / "classes.txt", "cat\n\ndog\n")
    with pytest.raises(RecordError, match=r"one\.txt:1: class is '1'"):  # the blank line is class 1
        read(tmp_path)
    write(tmp_path / "classes.txt", "cat\ndog\n")
    [found] = read(tmp_path)
    assert objects_of(found) == [[("dog", pytest.approx([40, 15, 60, 35]))]]
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(RecordError, match=r"nothing names the classes: expected a data\.yaml"):
        read_sources(tmp_path, ImportOptions(), format_name="yolo")
    write(tmp_path / "data.yaml", "names: [cat\n")
    with pytest.raises(RecordError, match=r"nothing names the classes.*data\.yaml: is not valid YAML"):
        read_sources(tmp_path, ImportOptions(), format_name="yolo")


def test_numbers_beyond_every_float_are_named(tmp_path: Path):
    noise(tmp_path / "one.jpg", SIZE)
    write(tmp_path / "classes.txt", "cat\ndog\n")
    write(tmp_path / "one.txt", "1e999 0.5 0.5 0.2 0.4\n")
    with pytest.raises(RecordError, match=r"one\.txt:1: class is '1e999'"):
        read(tmp_path)
    for config, message in (
        ("names: {1e999: cat}", "names holds"),
        ("names: [cat]\nkpt_shape: [1e999, 2]", "kpt_shape"),
    ):
        write(tmp_path / "data.yaml", f"train: .\n{config}\n")
        with pytest.raises(RecordError, match=message):
            read(tmp_path)


def test_yolo_keypoints_after_the_box_are_no_outline(tmp_path: Path):
    config = "train: images/train\nnames: [cat]\nkpt_shape: [3, 2]\n"
    [found] = read(yolo(tmp_path, "0 0.5 0.5 0.2 0.4 0.1 0.1 0.2 0.2 0.3 0.3\n", config))
    assert objects_of(found) == [[("cat", pytest.approx([40, 15, 60, 35]))]]


def test_where_yolo_labels_are():
    assert label_file(Path("/x/images/images/train/a.b.jpg")) == Path("/x/images/labels/train/a.b.txt")
    assert label_file(Path("pictures/a.jpg")) == Path("pictures/a.txt")


def test_class_names_of_a_file(tmp_path: Path):
    assert read_class_names(write(tmp_path / "a.yaml", "names: {1: b, 0: a}")) == ["a", "b"]
    assert read_class_names(write(tmp_path / "a.txt", "a\nb\n")) == ["a", "b"]
    with pytest.raises(RecordError, match=r"names has the numbers \[0, 2\]: expected 0 to 1"):
        read_class_names(write(tmp_path / "b.yaml", "names: {0: a, 2: b}"))


lines = st.lists(
    st.tuples(st.integers(0, 1), st.floats(0.2, 0.8), st.floats(0.2, 0.8), st.floats(0.01, 0.3), st.floats(0.01, 0.3)),
    min_size=1, max_size=5,
)  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(labels=lines, outline=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=6))
def test_yolo_is_read_as_supervision_reads_it(tmp_path_factory: pytest.TempPathFactory, labels, outline):
    supervision = pytest.importorskip("supervision")
    folder = yolo(
        tmp_path_factory.mktemp("yolo"),
        "".join(" ".join(map(str, line)) + "\n" for line in labels)
        + " ".join(map(str, [1, *(v for point in outline for v in point)])),
    )
    [found] = read(folder)
    reference = supervision.DetectionDataset.from_yolo(
        str(folder / "images/train"), str(folder / "labels/train"), str(folder / "data.yaml")
    )
    [(_, _, detections)] = list(reference)
    boxes = [box for _, box in objects_of(found)[0]]
    assert np.allclose(sorted(detections.xyxy.tolist()), boxes, atol=1e-3)
