"""Names that are alike, and pictures: every kind of trouble is named with its file; the others are counted."""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coordexp.data.check.findings import Finding
from coordexp.data.check.names import alike, name_findings
from coordexp.data.check.picture_findings import (
    leakage_findings,
    missing_findings,
    picture_faults,
    picture_findings,
)
from coordexp.data.check.pictures import look, look_at_all
from coordexp.data.check.source import Source
from coordexp.eval.coco.annotations import read_dataset
from coordexp.pictures import MAX_PIXELS, MIN_PIXELS, check_picture, scaling


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        ({"cat": 3, "Cat": 9, "dog": 1}, [["Cat", "cat"]]),
        (
            {"traffic light": 1, "traffic_light": 2, "traffic  light ": 3, "Traffic-Light": 4},
            [["Traffic-Light", "traffic  light ", "traffic_light", "traffic light"]],
        ),
        ({"caf\u00e9": 1, "cafe\u0301": 2}, [["cafe\u0301", "caf\u00e9"]]),
        ({"\uff23at": 1, "cat": 2, "\ufb01sh": 1, "fish": 1}, [["cat", "\uff23at"], ["\ufb01sh", "fish"]]),
        ({"stra\u00dfe": 1, "STRASSE": 2}, [["STRASSE", "stra\u00dfe"]]),
        ({"cat": 1, "cats": 1, "bat": 1, "cafe": 1, "caf\u00e9": 1}, []),
    ],
)  # fmt: skip
def test_names_that_readers_take_for_one(names: dict[str, int], groups: list[list[str]]):
    assert alike(Counter(names)) == groups


def test_names_alike_are_one_warning_with_their_counts():
    data = read_dataset(
        {
            "images": [{"id": 1}],
            "annotations": [{"image_id": 1, "category_id": k, "bbox": [0, 0, 9, 9]} for k in (1, 1, 2, 3)],
            "categories": [{"id": 1, "name": "Cat "}, {"id": 2, "name": "cat"}, {"id": 3, "name": "dog"}],
        }
    )
    [finding] = name_findings(data)
    assert (finding.level, finding.count, finding.examples) == ("warning", 1, ("'Cat ' (2) / 'cat' (1)",))


@pytest.mark.parametrize(
    ("size", "fault"),
    [
        ((640, 480), None),
        ((1, 1), None),
        ((2000, 10), None),
        (
            (2010, 10),
            "is 2010 x 10 pixels, an aspect ratio of 201, and the model's processor takes at most 200",
        ),
        ((6, 2000), "is 6 x 2000 pixels, an aspect ratio of 333"),
        ((0, 5), "has 0 x 5 pixels"),
    ],
)
def test_what_the_processor_takes_is_what_qwens_own_code_takes(size: tuple[int, int], fault: str | None):
    found = check_picture(*size)
    assert (found is None) if fault is None else (found is not None and fault in found)
    resize = pytest.importorskip("transformers.models.qwen2_vl.image_processing_qwen2_vl").smart_resize
    limits = {"factor": 32, "min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS}
    if fault is None:
        assert min(resize(size[1], size[0], **limits)) > 0
    elif min(size) > 0:
        with pytest.raises(ValueError, match="aspect ratio"):
            resize(size[1], size[0], **limits)


def test_scaling_keeps_the_pixels_within_the_processors_range():
    assert scaling(640, 480) == 1
    assert scaling(8192, 8192) == pytest.approx(0.5)
    assert scaling(64, 64) == pytest.approx(4)
    assert scaling(0, 0) == 1


def picture(
    path: Path, size: tuple[int, int] = (64, 48), mode: str = "RGB", exif: int = 1, seed: int = 0
) -> Path:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 200)
    elif mode == "F":
        image = Image.fromarray(pixels[:, :, 0].astype(np.float32))
    else:
        image = image.convert(mode)
    tags = Image.Exif()
    tags[0x0112] = exif
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **({"exif": tags} if exif != 1 else {}))
    return path


def source(
    folder: Path, *entries: tuple[str, tuple[int, int]], objects: list[list[Any]] = (), name: str = "gt.json"
) -> Source:
    """Images (file name, annotated size) and objects (row of the image, box)."""
    dataset = read_dataset(
        {
            "images": [
                {"id": i, "file_name": n, "width": w, "height": h} for i, (n, (w, h)) in enumerate(entries)
            ],
            "annotations": [{"image_id": row, "category_id": 1, "bbox": box} for row, box in objects],
            "categories": [{"id": 1, "name": "cat"}],
        }
    )
    return Source(folder / name, "coco", dataset, [folder / entry for entry, _ in entries])


def findings_of(data: Source) -> dict[str, Finding]:
    reports = look_at_all([path for path in data.pictures if path is not None])
    return {finding.kind: finding for finding in picture_findings(data, reports)}


def test_ordinary_pictures_have_no_finding(tmp_path: Path):
    for index, mode in enumerate(("RGB", "L", "P", "CMYK")):
        picture(tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}", mode=mode, seed=index)
    names = ("RGB.png", "L.png", "P.png", "CMYK.tif")
    assert findings_of(source(tmp_path, *((name, (64, 48)) for name in names))) == {}


def test_pictures_that_cannot_be_used_are_named_one_by_one(tmp_path: Path):
    half = picture(tmp_path / "half.jpg")
    half.write_bytes(half.read_bytes()[:900])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    picture(tmp_path / "float.tif", mode="F")
    picture(tmp_path / "thin.png", size=(2000, 6))
    picture(tmp_path / "other.png", size=(32, 24))
    picture(tmp_path / "turned.jpg", exif=6)
    picture(tmp_path / "fine.png")
    picture(tmp_path / "swapped.png", size=(48, 64))
    names = (
        "half.jpg",
        "text.jpg",
        "empty.png",
        "float.tif",
        "thin.png",
        "other.png",
        "turned.jpg",
        "fine.png",
        "swapped.png",
    )
    sizes = {"thin.png": (2000, 6)}
    data = source(tmp_path, *((name, sizes.get(name, (64, 48))) for name in names))
    reports = look_at_all([path for path in data.pictures if path is not None])
    faults = picture_faults(data, reports)
    expected = {
        0: "half.jpg cannot be read", 1: "text.jpg cannot be read: it is no picture", 2: "empty.png cannot be read",
        3: "float.tif has 32 bits a channel (mode F)", 4: "thin.png is 2000 x 6 pixels, an aspect ratio of 333",
        5: "other.png is 32 x 24 pixels, but the annotations are for 64 x 48. Use the files that were annotated",
        6: "turned.jpg is 48 x 64 pixels upright, by its EXIF orientation (6), but the annotations are for the 64 x 48",
    }  # fmt: skip
    expected[8] = (
        "swapped.png is 48 x 64 pixels, but the annotations are for 64 x 48. Are width and height swapped there?"
    )
    assert faults.keys() == expected.keys()
    for row, words in expected.items():
        assert words in faults[row]
    finding = findings_of(data)["pictures_unusable"]
    assert (finding.level, finding.count, finding.images) == ("error", 8, (*range(7), 8))


def test_a_picture_of_absurd_size_is_named_before_it_is_decoded(tmp_path: Path):
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 20_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "huge.png").write_bytes(
        png + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    )
    data = source(tmp_path, ("huge.png", (30_000, 20_000)))
    [fault] = findings_of(data)["pictures_unusable"].examples
    assert "huge.png is too large" in fault


def test_pictures_that_are_not_read_as_they_are_stored_are_counted(tmp_path: Path):
    picture(tmp_path / "turned.jpg", exif=6, seed=1)
    picture(tmp_path / "mirrored.jpg", exif=2, seed=2)
    picture(tmp_path / "deep.png", mode="I;16", seed=3)
    picture(tmp_path / "glass.png", mode="RGBA", seed=4)
    data = source(
        tmp_path,
        ("turned.jpg", (48, 64)),
        ("mirrored.jpg", (64, 48)),
        ("deep.png", (64, 48)),
        ("glass.png", (64, 48)),
    )
    found = findings_of(data)
    assert {kind: (str(f.level), f.examples) for kind, f in found.items()} == {
        "exif_orientation": ("warning", ("turned.jpg", "mirrored.jpg")),
        "bits_16": ("warning", ("deep.png",)),
        "alpha": ("warning", ("glass.png",)),
    }


def test_one_picture_under_two_names_is_found_by_its_pixels(tmp_path: Path):
    picture(tmp_path / "a.png", seed=5)
    Image.open(tmp_path / "a.png").save(tmp_path / "b.bmp")  # other bytes, the same pixels
    picture(tmp_path / "c.png", seed=6)
    entries = [("a.png", (64, 48)), ("b.bmp", (64, 48)), ("c.png", (64, 48)), ("c.png", (64, 48))]
    data = source(tmp_path, *entries, objects=[[0, [1, 2, 30, 30]], [2, [5, 5, 9, 9]], [3, [5, 5, 9, 9]]])
    found = findings_of(data)
    assert found["same_picture_other_labels"].examples == ("a.png (id 0) = b.bmp (id 1)",)
    assert found["same_picture"].examples == ("c.png (id 2) = c.png (id 3)",)
    without_pictures = Source(data.path, "coco", data.dataset, [None] * 4)
    [finding] = picture_findings(without_pictures, {})  # by name alone
    assert (finding.kind, finding.count) == ("same_picture", 1)


def test_pictures_of_both_splits_are_found(tmp_path: Path):
    for index in range(3):
        picture(tmp_path / "train" / f"{index}.png", seed=index)
        picture(tmp_path / "val" / f"v{index}.png", seed=index + 2)
    train = source(tmp_path / "train", *((f"{i}.png", (64, 48)) for i in range(3)))
    val = source(tmp_path / "val", *((f"v{i}.png", (64, 48)) for i in range(3)))
    reports = look_at_all([path for data in (train, val) for path in data.pictures if path is not None])
    [finding] = leakage_findings([train, val], reports)
    assert (finding.level, finding.count, finding.examples) == ("warning", 1, ("2.png = v0.png",))
    assert leakage_findings([train], reports) == []


def test_missing_files_and_unknown_folders(tmp_path: Path):
    picture(tmp_path / "a.png")
    data = source(tmp_path, ("a.png", (64, 48)), ("gone.png", (64, 48)))
    [finding] = missing_findings(data)
    assert (finding.level, finding.count, finding.examples) == ("error", 1, ("gone.png",))
    [unknown] = missing_findings(Source(data.path, "coco", data.dataset, [None, None]))
    assert (unknown.level, unknown.kind) == ("warning", "pictures_unknown")


def test_processes_report_what_one_process_reports(tmp_path: Path):
    paths = [picture(tmp_path / f"{index}.png", size=(8, 8), seed=index) for index in range(220)]
    paths.append(tmp_path / "gone.png")
    counted: list[tuple[int, int]] = []
    reports = look_at_all(
        [*paths, paths[0]], on_done=lambda done, total: counted.append((done, total)), workers=2
    )
    assert list(reports) == paths
    assert counted == [(1, 221)] * 221
    assert reports == {path: look(path) for path in paths}
    assert reports[paths[-1]].fault == f"image {tmp_path / 'gone.png'} does not exist. Check its path."
