"""LVIS v1 annotations, in the published form: no file names, synonyms, and what is known about each image."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from coordexp.cli.main import main
from coordexp.codec.records import read_jsonl
from coordexp.data.formats.exports.coco import export_coco
from coordexp.data.formats.options import ImportOptions
from coordexp.data.formats.readers.lvis import import_lvis, own_synonyms, readable_name
from coordexp.errors import ConfigError, RecordError
from coordexp.eval.coco.federation import NEGATIVE, NOT_EXHAUSTIVE


def category(number: int, name: str, synonyms: list[str], frequency: str) -> dict:
    return {
        "id": number, "name": name, "synonyms": synonyms, "frequency": frequency, "synset": f"{name}.n.01",
        "def": "...", "image_count": 1, "instance_count": 1,
    }  # fmt: skip


def image(number: int, neg: list[int], not_exhaustive: list[int]) -> dict:
    return {
        "id": number, "width": 640, "height": 480, "license": 1, "date_captured": "2013-11-14 16:28:13",
        "flickr_url": "", "coco_url": f"http://images.cocodataset.org/val2017/{number:012}.jpg",
        "neg_category_ids": neg, "not_exhaustive_category_ids": not_exhaustive,
    }  # fmt: skip


def annotation(number: int, image_id: int, category_id: int, *box: float) -> dict:
    x, y, width, height = box
    outline = [x, y, x + width, y, x + width, y + height]
    return {
        "id": number, "image_id": image_id, "category_id": category_id, "bbox": list(box),
        "area": width * height / 2, "segmentation": [outline],
    }  # fmt: skip


LVIS = {
    "info": {}, "licenses": [],
    "images": [image(397133, [3], [2]), image(37777, [], [])],
    "categories": [
        category(1, "bow_(weapon)", ["bow_(weapon)", "longbow"], "r"),
        category(2, "baseball_bat", ["baseball_bat", "bat"], "f"),
        category(3, "bat_(animal)", ["bat_(animal)", "bat"], "c"),
    ],
    "annotations": [
        annotation(1, 397133, 2, 10, 200, 50, 60), annotation(2, 397133, 1, 5, 10, 50, 60),
        annotation(3, 397133, 2, 300, 100, 50, 60), annotation(4, 37777, 1, 0, 0, 639, 479),
    ],
}  # fmt: skip


def convert(folder: Path, source=LVIS, **options):
    (folder / "lvis.json").write_text(json.dumps(source), encoding="utf-8")
    converted = import_lvis(folder / "lvis.json", folder / "out.jsonl", ImportOptions(), **options)
    return read_jsonl(folder / "out.jsonl"), converted.counts


def test_names_are_readable_and_image_knowledge_is_kept(tmp_path: Path):
    records, counts = convert(tmp_path)
    assert [record.images for record in records] == [
        ("val2017/000000397133.jpg",),
        ("val2017/000000037777.jpg",),
    ]
    assert [obj.desc for obj in records[0].objects] == ["bow (weapon)", "baseball bat", "baseball bat"]
    assert records[1].objects[0].bins == (0, 0, 999, 999)
    assert records[0].metadata == {
        "image_id": 397133, "file_name": "val2017/000000397133.jpg", "neg_categories": ["bat (animal)"],
        "not_exhaustive_categories": ["baseball bat"],
        "category_frequencies": {"bow (weapon)": "r", "baseball bat": "f"},
    }  # fmt: skip
    assert (counts["annotations_rare"], counts["annotations_frequent"], counts["objects_written"]) == (
        2,
        2,
        4,
    )


def test_synonyms_are_drawn_by_seed_and_lead_back_to_their_category(tmp_path: Path):
    assert own_synonyms([c["name"] for c in LVIS["categories"]], LVIS["categories"]) == [
        ["bow (weapon)", "longbow"],
        ["baseball bat"],  # "bat" could be either
        ["bat (animal)"],
    ]
    many = copy.deepcopy(LVIS)
    many["annotations"] = [annotation(i, 397133, 1, i, i, 20, 20) for i in range(1, 41)]
    drawn = {obj.desc for obj in convert(tmp_path, many, name_by="synonyms", seed=1)[0][0].objects}
    assert drawn == {"bow (weapon)", "longbow"}
    first, again, other = (
        [obj.desc for obj in convert(tmp_path, many, name_by="synonyms", seed=seed)[0][0].objects]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    export_coco(tmp_path / "out.jsonl", tmp_path / "back.json", categories=tmp_path / "lvis.json")
    back = json.loads((tmp_path / "back.json").read_text())
    assert {a["category_id"] for a in back["annotations"]} == {1}
    assert back["categories"] == LVIS["categories"]
    for categories in (None, tmp_path / "lvis.json"):  # what images were checked for comes back, by id
        export_coco(tmp_path / "out.jsonl", tmp_path / "back.json", categories=categories)
        back = json.loads((tmp_path / "back.json").read_text())
        names = {c["id"]: readable_name(c["name"]) for c in back["categories"]}
        checked = [
            [[names[number] for number in image[key]] for key in (NEGATIVE, NOT_EXHAUSTIVE)]
            for image in back["images"]
        ]
        assert checked == [[["bat (animal)"], ["baseball bat"]], [[], []]]


def test_faults_are_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="name_by is 'def'"):
        convert(tmp_path, name_by="def")
    no_url = copy.deepcopy(LVIS)
    del no_url["images"][1]["coco_url"]
    with pytest.raises(RecordError, match=r"lvis\.json: images\[1\] \(id 37777\) has neither a coco_url"):
        convert(tmp_path, no_url)
    unknown = copy.deepcopy(LVIS)
    unknown["images"][0]["neg_category_ids"] = [9]
    with pytest.raises(RecordError, match=r"lvis\.json: images\[0\]\.neg_category_ids names category id 9"):
        convert(tmp_path, unknown)


def test_the_command(tmp_path: Path, capsys):
    convert(tmp_path)
    argv = ["data", "from-lvis", "--annotations", tmp_path / "lvis.json", "--output", tmp_path / "x.jsonl",
            "--names", "synonyms", "--seed", 3, "--polygons"]  # fmt: skip
    assert main([str(item) for item in argv]) == 0
    assert "polygons written" in capsys.readouterr().out
    assert {obj.kind for record in read_jsonl(tmp_path / "x.jsonl") for obj in record.objects} == {"poly"}
