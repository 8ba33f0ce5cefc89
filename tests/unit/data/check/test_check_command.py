"""`coordexp data check` and `convert`: exit status, what is printed, and a page that a browser shows without a word."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.annotated import coco, noise, source

from coordexp.cli.main import main
from coordexp.codec.records import read_jsonl
from coordexp.data.check.samples import MAX_OBJECTS, draw_samples
from coordexp.data.check.tables import class_rows, overview, picture_sizes, spreads

BOXES = [(0, 0, (5.0, 6.0, 30.0, 20.0)), (0, 1, (40.0, 10.0, 15.0, 30.0)), (1, 0, (2.0, 3.0, 50.0, 60.0))]


def run(*words: object) -> int:
    return main(["data", *map(str, words)])


def data_set(folder: Path, value: dict[str, Any] | None = None, name: str = "gt.json") -> Path:
    """A COCO file with its pictures in `images` beside it."""
    value = value or coco([(100, 80), (64, 90)], BOXES)
    source(folder / "images", value)
    (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder / name


class Page(HTMLParser):
    """Everything in a page that could ask for something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [
            value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "srcset", "data")
        ]


def test_a_clean_data_set_ends_with_0_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("check", data_set(tmp_path), "--output", tmp_path / "page.html") == 0
    out = capsys.readouterr().out
    assert "0 kinds of error, 0 of warning" in out
    assert "wrote" in out
    page = Page((tmp_path / "page.html").read_text())
    assert all(link.startswith("data:") for link in page.sources)
    assert "script" not in page.tags
    assert page.tags.count("figure") == 2
    assert page.tags.count("rect") == len(BOXES)


def test_suspicious_data_end_with_1_and_errors_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    value = coco([(100, 80), (64, 90)], [*BOXES, (0, 2, (5.0, 6.0, 30.0, 20.5))])
    assert run("check", data_set(tmp_path, value), "--output", tmp_path / "page.html") == 1
    assert "warning: 1 pair of boxes of different descriptions overlaps" in capsys.readouterr().out
    (tmp_path / "images" / "picture 1.png").write_bytes(b"broken")
    assert run("check", tmp_path / "gt.json", "--output", tmp_path / "page.html") == 2
    out = capsys.readouterr().out
    assert re.search(r"error: 1 picture cannot be used \(image .*picture 1\.png cannot be read", out)
    assert "1 kind of error, 1 of warning" in out
    html = (tmp_path / "page.html").read_text()
    assert "picture 1.png cannot be read" in html
    assert Page(html).tags.count("figure") == 1


def test_splits_are_compared_by_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train = data_set(tmp_path / "a")
    val = data_set(tmp_path / "b", coco([(100, 80)], BOXES[:1]))  # its picture is made from the same seed
    assert run("check", train, val, "--output", tmp_path / "page.html") == 1
    assert re.search(r"warning: 1 picture of .*a/gt\.json is in .*b/gt\.json too", capsys.readouterr().out)


def test_every_broken_line_of_a_data_file_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    noise(tmp_path / "a.png", (40, 40))
    good = {
        "images": ["a.png"],
        "width": 40,
        "height": 40,
        "objects": [{"desc": "cat", "bbox_2d": [0, 0, 999, 500]}],
    }
    bad = {**good, "objects": [{"desc": "cat", "bbox_2d": [900, 0, 100, 500]}]}
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, [bad, good, bad])))
    assert run("check", tmp_path / "d.jsonl", "--output", tmp_path / "page.html") == 2
    out = capsys.readouterr().out
    assert re.search(r"error: 2 entries cannot be read \(.*d\.jsonl:1: object 0 .*x2 < x1", out)


def test_model_text_cannot_become_markup(tmp_path: Path):
    value = coco([(100, 80)], BOXES[:1])
    value["categories"][0]["name"] = '<script>alert(1)</script>" onload="x'
    run("check", data_set(tmp_path, value), "--output", tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_what_cannot_be_read_at_all_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "gt.json").write_text('{"images": null, "annotations": [], "categories": []}')
    assert run("check", tmp_path / "gt.json", "--output", tmp_path / "page.html") == 2
    assert (
        capsys.readouterr().err == f"coordexp data: {tmp_path / 'gt.json'}: images is None: expected a list\n"
    )
    assert not (tmp_path / "page.html").exists()


def test_tables_of_a_source_worked_by_hand(tmp_path: Path):
    value = coco([(100, 80), (64, 90), (64, 90)], [*BOXES, (1, 0, (0, 0, 2, 98))])
    value["annotations"][1]["iscrowd"] = 1
    data = source(tmp_path, value)
    assert overview(data)[1:] == (3, 1, 3, 1, 2)
    [row] = class_rows(data)
    assert row == ("cat", 3, 2, 2, 1, 0, 30.0, 60.0)  # 600 and 196 are small, 3000 is medium
    assert picture_sizes(data) == [("64 x 90", 2), ("100 x 80", 1)]
    values = {spread.name: spread.values for spread in spreads(data)}
    assert values["objects in an image"] == (0, pytest.approx(0.1), 1, pytest.approx(1.9), 2)
    assert values["box width (pixels)"][::2] == (2, 30, 50)


def test_samples_show_what_was_found_and_no_more_objects_than_can_be_seen(tmp_path: Path):
    many = [(0, 0, (float(i % 20), float(i // 20), 9.0, 9.0)) for i in range(MAX_OBJECTS + 7)]
    data = source(tmp_path, coco([(100, 80)] + [(64, 48)] * 9, many))
    assert [sample.title for sample in draw_samples(data, [], 4, seed=1)] == [
        sample.title for sample in draw_samples(data, [], 4, seed=1)
    ]
    assert len({tuple(s.title for s in draw_samples(data, [], 4, seed=seed)) for seed in range(5)}) > 1
    [crowded] = [s for s in draw_samples(data, [], 10) if s.title == "picture 0.png"]
    assert (len(crowded.shapes), crowded.num_hidden) == (MAX_OBJECTS, 7)


# converting


def test_convert_takes_what_check_accepts_and_prints_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    value = coco([(100, 80), (64, 90)], [*BOXES, (0, 2, (5.0, 6.0, 30.0, 20.5))])
    data_set(tmp_path, value)
    assert run("convert", tmp_path / "gt.json", tmp_path / "out.jsonl", "--dataset", "mine") == 0
    assert "warning: 1 pair of boxes of different descriptions overlaps" in capsys.readouterr().out
    records = read_jsonl(tmp_path / "out.jsonl", require_images=True)
    assert [len(record.objects) for record in records] == [3, 1]
    assert records[0].images == ("images/picture 0.png",)
    assert records[0].metadata == {"image_id": 0, "file_name": "picture 0.png", "dataset": "mine"}


def test_convert_to_every_format_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data_set(tmp_path)
    assert run("convert", tmp_path / "gt.json", tmp_path / "a.jsonl") == 0
    for target in ("yolo", "voc", "labelme", "cvat"):
        assert run("convert", tmp_path / "a.jsonl", tmp_path / target, "--to", target) == 0
        assert run("convert", tmp_path / target, tmp_path / f"{target}.jsonl") == 0
        first, again = (read_jsonl(tmp_path / name) for name in ("a.jsonl", f"{target}.jsonl"))
        assert [[o.desc for o in record.objects] for record in again] == [
            [o.desc for o in record.objects] for record in first
        ]
        for one, other in zip(first, again, strict=True):
            for a, b in zip(one.objects, other.objects, strict=True):
                assert max(abs(x - y) for x, y in zip(a.bins, b.bins, strict=True)) <= 1
    assert run("convert", tmp_path / "a.jsonl", tmp_path / "back.json") == 0
    assert json.loads((tmp_path / "back.json").read_text())["images"][1]["file_name"] == "picture 1.png"
    capsys.readouterr()
    assert run("convert", tmp_path / "a.jsonl", tmp_path / "yolo", "--to", "yolo") == 2
    assert "yolo is there already: expected the name of a new folder." in capsys.readouterr().err
    assert run("convert", tmp_path / "a.jsonl", tmp_path / "folder") == 2
    assert "say what to write there (--to)" in capsys.readouterr().err


def test_splits_are_chosen_or_written_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for split, size in (("train", (60, 40)), ("val", (40, 30))):
        noise(tmp_path / "images" / split / "a.png", size)
        (tmp_path / "labels" / split).mkdir(parents=True)
        (tmp_path / "labels" / split / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat]\n")
    assert run("convert", tmp_path, tmp_path / "x.jsonl") == 2
    assert (
        "holds several sets (train, val): take one (--split), or write each ({split}"
        in capsys.readouterr().err
    )
    assert run("convert", tmp_path, tmp_path / "x.jsonl", "--split", "val") == 0
    assert [record.width for record in read_jsonl(tmp_path / "x.jsonl")] == [40]
    assert run("convert", tmp_path, tmp_path / "y_{split}.jsonl") == 0
    assert [read_jsonl(tmp_path / f"y_{split}.jsonl")[0].width for split in ("train", "val")] == [60, 40]


# import refuses what check calls an error, in the same words


def turned(path: Path) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.new("RGB", (100, 80)).save(path, exif=tags)


BROKEN: dict[str, Any] = {
    "half a JPEG": (lambda path: path.write_bytes(path.read_bytes()[:700]), r"picture_0\.jpg cannot be read"),
    "EXIF against the annotations": (turned, r"is 80 x 100 pixels upright, by its EXIF orientation \(6\)"),
    "another size": (lambda path: Image.new("RGB", (50, 40)).save(path), r"is 50 x 40 pixels, but .* for 100 x 80"),
    "a text": (lambda path: path.write_text("hello"), r"picture_0\.jpg cannot be read: it is no picture"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_picture_that_check_refuses_is_refused_by_the_import_or_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
):
    spoil, message = BROKEN[kind]
    value = coco([(100, 80), (64, 90)], BOXES)
    value["images"][0]["file_name"] = "picture_0.jpg"
    data_set(tmp_path, value)
    spoil(tmp_path / "images" / "picture_0.jpg")
    argv = [
        "--annotations",
        tmp_path / "gt.json",
        "--output",
        tmp_path / "o.jsonl",
        "--image-root",
        tmp_path / "images",
    ]
    assert run("check", tmp_path / "gt.json", "--output", tmp_path / "page.html") == 2
    assert re.search(message, " ".join(capsys.readouterr().out.split()))
    assert run("from-coco", *argv) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "o.jsonl").exists()
    assert run("from-coco", *argv, "--bad-images", "skip") == 0
    assert [record.width for record in read_jsonl(tmp_path / "o.jsonl")] == [64]
    assert "images unusable left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([(0, 0, (0.1, 0.2, 0.3, 0.25)), (1, 1, (0.5, 0.5, 0.4, 0.3))], r"within 0\.\.1 and look normalised"),
        (
            [(0, 0, (50, 40, 90, 75)), (1, 1, (30, 50, 60, 85)), (1, 1, (40, 60, 50, 80))],
            r"look like corners \(x1, y1",
        ),
    ],
)
def test_boxes_that_check_refuses_are_refused_by_the_import(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], boxes: Any, message: str
):
    data_set(tmp_path, coco([(100, 80), (64, 90)], boxes))
    assert run("check", tmp_path / "gt.json", "--output", tmp_path / "page.html") == 2
    assert re.search(message, capsys.readouterr().out)
    assert run("from-coco", "--annotations", tmp_path / "gt.json", "--output", tmp_path / "o.jsonl") == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_name_that_leads_outside_is_followed_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    value = coco([(100, 80)], BOXES[:1])
    value["images"][0]["file_name"] = "../secret.png"
    noise(tmp_path / "secret.png", (100, 80))
    (tmp_path / "images").mkdir()
    (tmp_path / "gt.json").write_text(json.dumps(value))
    argv = [
        "--annotations",
        tmp_path / "gt.json",
        "--output",
        tmp_path / "o.jsonl",
        "--image-root",
        tmp_path / "images",
    ]
    assert run("from-coco", *argv) == 2
    assert re.search(
        r"images\[0\]\.file_name \(id 0\) is '\.\./secret\.png', which leads outside", capsys.readouterr().err
    )
    assert run("from-coco", *argv, "--allow-outside") == 0
    assert read_jsonl(tmp_path / "o.jsonl", require_images=True)[0].images == ("secret.png",)


def test_a_file_without_a_readable_record_is_not_blamed_for_its_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "d.jsonl").write_text('{"image": "a.png"}\n')
    assert run("check", tmp_path / "d.jsonl", "--output", tmp_path / "page.html") == 2
    out = capsys.readouterr().out
    assert "error: 1 entry cannot be read" in out
    assert "1 kind of error, 0 of warning" in out


RUN = """
model: somewhere
dataset: [d.jsonl]
max_steps: 10
seed: 3
external_plugins: [coordexp/plugin.py]
ignore_args_error: true
custom_trainer_variant: stage1_coord
coordexp:
  custom:
    augmentation:
      enabled: true
      ops: [{name: hflip, params: {prob: 1.0}}, {name: resize_by_scale, params: {lo: 1.5, hi: 1.5}}]
      curriculum: {phases: [{until_percent: 50, ops: {resize_by_scale: {prob: 0.0}}}, {until_percent: 100}]}
"""


def augmentable(folder: Path) -> Path:
    """Two pictures, red on the left half; the box of the first is that half."""
    picture = Image.new("RGB", (100, 80), "black")
    picture.paste("red", (0, 0, 50, 80))
    objects = [{"desc": "half", "bbox_2d": [0, 0, 499, 999]}]
    for name in ("a.png", "b.png"):
        picture.save(folder / name)
    rows = [{"images": [name], "width": 100, "height": 80, "objects": objects} for name in ("a.png", "b.png")]
    (folder / "d.jsonl").write_text("not a record\n" + "".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(RUN)
    return folder / "d.jsonl"


def test_augmented_samples_are_drawn_as_the_run_file_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = augmentable(tmp_path)
    argv = ["check", data, "--output", tmp_path / "page.html", "--augment", 4]
    assert run(*argv, "--config", tmp_path / "run.yaml") == 2  # for the line that is no record
    page = (tmp_path / "page.html").read_text()
    sheet = page[page.index("As training shows them") : page.index("<h3>Classes")]
    cards = sheet.split("<figure")[1:]
    # mirrored, and larger in the second half of the run: the box is the right half of the picture
    sizes = [(int(w), int(h)) for w, h in re.findall(r'viewBox="0 0 (\d+) (\d+)"', sheet)]
    assert sizes == [(100, 80), (100, 80), (150, 120), (150, 120)]
    for card, (width, _) in zip(cards, sizes, strict=True):
        x, box_width = (float(re.search(r'<rect x="([^"]+)".* width="([^"]+)"', card)[n]) for n in (1, 2))
        assert x == pytest.approx(width / 2, abs=1)
        assert x + box_width == pytest.approx(width - 1, abs=1)
        encoded = re.search(r"data:image/jpeg;base64,([^\"]+)", card)[1]
        shown = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
        left, right = (shown.getpixel((round(shown.width * at), 20))[0] for at in (0.2, 0.8))
        assert (left < 30, right > 220) == (True, True)
    assert re.findall(r"epoch \d|\d+ % of the run", sheet) == [
        "epoch 1", "0 % of the run", "epoch 1", "25 % of the run",
        "epoch 2", "50 % of the run", "epoch 2", "75 % of the run",
    ]  # fmt: skip
    assert "a.png, line 2" in sheet
    assert "b.png, line 3" in sheet
    for wrong, message in (
        (["--augment", 2], "--augment N and --config YAML go together"),
        (["--config", tmp_path / "run.yaml"], "--augment N and --config YAML go together"),
    ):
        assert run("check", data, "--output", tmp_path / "p.html", *wrong) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "off.yaml").write_text(RUN.replace("enabled: true", "enabled: false"))
    assert run(*argv, "--config", tmp_path / "off.yaml") == 2
    assert "custom.augmentation is off, so training changes nothing" in capsys.readouterr().err
    value = coco([(100, 80)], BOXES[:1])
    other = data_set(tmp_path / "coco", value)
    assert run("check", other, *argv[2:], "--config", tmp_path / "run.yaml") == 2
    assert "is coco: --augment shows what training reads, our JSONL" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium on the PATH")
def test_a_browser_shows_the_page_without_a_complaint(tmp_path: Path):
    value = coco(
        [(100, 80), (64, 90)], [*BOXES, (0, 2, (5.0, 6.0, 30.0, 20.5))], segmentation=[[5, 6, 30, 8, 20, 26]]
    )
    run("check", data_set(tmp_path, value), "--output", tmp_path / "page.html")
    assert dom_of(tmp_path / "page.html", tmp_path).count("<figure") == 2
    (tmp_path / "augment").mkdir()
    data = augmentable(tmp_path / "augment")
    page = tmp_path / "augment" / "page.html"
    run("check", data, "--output", page, "--augment", 3, "--config", data.with_name("run.yaml"))
    dom = dom_of(page, tmp_path)
    assert dom.count("<figure") == 2 + 3
    assert "As training shows them" in dom


def dom_of(page: Path, folder: Path) -> str:
    """The page as a browser builds it, which wrote nothing to its console and asked nobody for anything."""
    text = page.read_text()
    assert all(link.startswith("data:") for link in Page(text).sources)
    assert "default-src 'none'" in text  # the browser refuses, and says so in its console
    done = subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--v=0", "--dump-dom",
            f"file://{page}",
        ],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout
