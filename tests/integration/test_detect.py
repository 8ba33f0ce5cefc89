"""`coordexp detect`: folders of anybody's pictures, kept answers, and files that other tools read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.bad_pictures import BAD
from support.pictures import HEIGHT, PICTURES, WIDTH, marked_scene, write_picture

from coordexp.cli.main import main
from coordexp.data.formats.options import ImportOptions
from coordexp.data.formats.readers.sources import read_sources
from coordexp.geometry import xywh_to_xyxy

pytestmark = pytest.mark.slow
CUT = ["--max-new-tokens", 8, "--no-guided"]
BAD_FILES = {
    name: (content, why) for name, (content, _, why) in BAD.items() if content and name != "other_size.png"
}


def detect(*args: object) -> int:
    return main(["detect", *map(str, args)])


def found_in(folder: Path) -> dict:
    return json.loads((folder / "detections.json").read_text())


def named(found: dict) -> list[str]:
    return [one["image"] for one in found["pictures"]]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Pictures of every kind that can be used, and of every kind that cannot, in two folders."""
    home = tmp_path / "photos"
    (home / "b").mkdir(parents=True)
    for name in PICTURES:
        write_picture(home, name)
    marked_scene().convert("CMYK").save(home / "b" / "cmyk.jpg")
    marked_scene().convert("L").save(home / "b" / "gray.PNG")
    for name, (content, _) in BAD_FILES.items():
        (home / "b" / name).write_bytes(content)
    (home / "empty_name.txt").write_text("no picture, and not called one")
    (home / ".hidden.jpg").write_text("neither")
    return home


def test_broken_pictures_are_named_and_lose_nothing_else(
    nano_model: Path, photos: Path, tmp_path: Path, capsys
):
    assert len(BAD_FILES) >= 6
    assert (
        detect(photos, tmp_path / "missing.jpg", "--model", nano_model, "--save", tmp_path / "out", *CUT) == 0
    )
    said = capsys.readouterr().err.splitlines()
    left_out = [line for line in said if line.startswith("left out ")]
    assert len(left_out) == len(BAD_FILES) + 1
    for name, why in [
        *((name, why) for name, (_, why) in BAD_FILES.items()),
        ("missing.jpg", "does not exist"),
    ]:
        assert [why in line for line in left_out if f"/{name}: " in line] == [True]
    assert f"{len(left_out)} of {len(left_out) + len(PICTURES) + 2} pictures were left out" in said
    found = found_in(tmp_path / "out")
    assert named(found) == [*sorted(PICTURES), "b/cmyk.jpg", "b/gray.PNG"]
    assert [one["image"] for one in found["left_out"]] == [
        *(f"b/{n}" for n in sorted(BAD_FILES)),
        "missing.jpg",
    ]
    for one in found["pictures"]:
        turned = one["image"].startswith(("turned", "mirrored"))
        assert (one["width"], one["height"]) == ((HEIGHT, WIDTH) if turned else (WIDTH, HEIGHT)), one["image"]
        with Image.open(tmp_path / "out" / "drawn" / one["image"]) as drawn:
            assert (drawn.width < drawn.height) == turned
    marked = Image.open(tmp_path / "out" / "drawn" / "turned.jpg").convert("RGB")  # the mark is upper right
    assert marked.getpixel((marked.width - 10, 10))[0] > 200 > 60 > marked.getpixel((10, 10))[0]


def test_without_a_readable_picture_it_is_bad_input(nano_model: Path, tmp_path: Path, capsys):
    (tmp_path / "page.jpg").write_text("<html>")
    assert detect(tmp_path, "--model", nano_model, *CUT) == 2
    said = capsys.readouterr().err
    assert "page.jpg: image" in said
    assert "none of the 1 pictures can be used" in said
    for source, why in ((tmp_path / "*.png", "holds no picture"), (tmp_path, "belongs to --save")):
        assert detect(source, "--model", nano_model, *(["--overwrite"] if "save" in why else [])) == 2
        assert why in capsys.readouterr().err


def test_nothing_is_asked_twice(nano_model: Path, scenes: Path, tmp_path: Path, capsys):
    home, out = tmp_path / "frames", tmp_path / "frames" / "out"  # what is drawn is no input
    shutil.copytree(scenes / "images" / "val", home)
    first, second, *_ = sorted(home.glob("*.png"))
    command = [home, "--model", nano_model, "--save", out, "--batch-size", 2, *CUT]
    assert detect(*command) == 0
    whole, answers = found_in(out), (out / "answers.jsonl").read_bytes()
    assert "on 4 pictures\n" in capsys.readouterr().out

    # stopped in the middle of the last line, with one picture more, one changed and one under another name
    (out / "answers.jsonl").write_bytes(answers[:-20])
    first.rename(home / "zebra.png")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(second)
    Image.fromarray(noise[::-1].copy()).save(home / "more.png")
    assert detect(*command) == 0
    assert "on 5 pictures (2 answered before)" in capsys.readouterr().out
    again = found_in(out)
    assert named(again) == ["000001.png", "000002.png", "000003.png", "more.png", "zebra.png"]
    kept = (out / "answers.jsonl").read_bytes()
    assert kept.startswith(answers[: answers.rindex(b"\n", 0, -1) + 1])
    assert again["pictures"][4]["text"] == whole["pictures"][0]["text"]
    assert again["pictures"][1] == whole["pictures"][2]

    assert detect(*command) == 0
    assert "(5 answered before)" in capsys.readouterr().out
    assert (out / "answers.jsonl").read_bytes() == kept

    assert detect(*command, "--classes", "cat") == 2
    assert "prompt: " in capsys.readouterr().err
    other = shutil.copytree(nano_model, tmp_path / "other")
    (other / "generation_config.json").write_text("{}")
    command[2] = other
    assert detect(*command) == 2
    assert "model_hash: " in capsys.readouterr().err
    assert detect(*command, "--overwrite") == 0
    assert "answered before" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def taught_run(taught_model: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The command that answers the training scenes, run once."""
    out = tmp_path_factory.mktemp("detect") / "out"
    command = [scenes / "images" / "train", "--model", taught_model, "--save", out, "--max-new-tokens", 160]
    assert detect(*command) == 0
    return command


@pytest.mark.parametrize(
    ("form", "written"), [("coco", "coco.json"), ("yolo", "yolo"), ("labelme", "labelme")]
)
def test_other_tools_read_what_was_found(taught_run, form: str, written: str):
    out = Path(taught_run[4])
    assert detect(*taught_run, "--format", form) == 0
    assert detect(*taught_run, "--format", form) == 0  # replaces what it wrote
    pictures = found_in(out)["pictures"]
    assert sum(len(one["objects"]) for one in pictures) >= 8
    options = ImportOptions(image_root=Path(taught_run[0]) if form == "coco" else None)
    (source,) = read_sources(out / written, options, format_name=form)
    data = source.dataset
    assert [Path(name).name for name in data.file_names] == [one["image"] for one in pictures]
    boxes = xywh_to_xyxy(data.boxes_xywh_M4)
    for row, one in enumerate(pictures):
        mine = np.flatnonzero(data.image_M == row)
        assert [data.category_names[data.category_M[m]] for m in mine] == [
            obj["label"] for obj in one["objects"]
        ]
        expected = np.reshape([obj["xyxy"] for obj in one["objects"]], (-1, 4))
        np.testing.assert_allclose(boxes[mine], expected, atol=2e-3)
    if form == "coco":
        results = json.loads((out / "coco_results.json").read_text())
        assert [one["score"] for one in results] == [
            obj["score"] for one in pictures for obj in one["objects"]
        ]
        assert [one["category_id"] for one in results] == [data.category_ids[k] for k in data.category_M]


def test_without_a_folder_the_console_shows_them(taught_run, taught_model: Path, capsys):
    picture = Path(taught_run[0]) / "000000.png"
    (expected,) = (one for one in found_in(Path(taught_run[4]))["pictures"] if one["image"] == "000000.png")
    label = expected["objects"][0]["label"]
    model = ["--model", taught_model, "--max-new-tokens", 160]
    assert detect(picture, *model, "--format", "json", "--save", "-") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["text"] == expected["text"]
    assert [obj["bins"] for obj in shown["objects"]] == [obj["bins"] for obj in expected["objects"]]
    assert (
        detect(picture, *model, "--classes", f"{label},cat", "--prompt", "Detect all objects in the image.")
        == 0
    )
    assert "detections" in capsys.readouterr().out
    assert detect(picture, *model, "--format", "yolo") == 2
    assert "--save DIR" in capsys.readouterr().err
