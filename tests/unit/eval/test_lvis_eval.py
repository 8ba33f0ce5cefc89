"""Average precision by the rules of LVIS: the numbers of the lvis package, its rules by hand, the way of the data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.lvis_reference import lvis_directly, random_lvis

from coordexp.cli.main import main
from coordexp.codec.parse import ParsedRollout
from coordexp.codec.records import read_jsonl
from coordexp.errors import ConfigError, RecordError
from coordexp.eval.coco.annotations import read_dataset, read_results
from coordexp.eval.coco.evaluate import run_lvis
from coordexp.eval.evaluate import EvalSettings
from coordexp.eval.predictions.artifacts import SCORED, artifact_line
from coordexp.eval.predictions.image_result import objects_of
from coordexp.files import write_jsonl

OURS = {
    "AP": "AP", "AP50": "AP50", "AP75": "AP75", "APs": "AP_small", "APm": "AP_medium", "APl": "AP_large",
    "APr": "APr", "APc": "APc", "APf": "APf", "AR@300": "AR300", "ARs@300": "AR_small", "ARm@300": "AR_medium",
    "ARl@300": "AR_large",
}  # fmt: skip


@pytest.fixture
def lvis_numpy(monkeypatch):
    """`numpy.float`, which the lvis package takes for granted."""
    pytest.importorskip("lvis")
    monkeypatch.setattr(np, "float", float, raising=False)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize(("seed", "crowded"), [(0, False), (1, False), (2, True), (3, True)])
def test_numbers_and_tables_are_those_of_the_lvis_package(tmp_path, lvis_numpy, seed, crowded, iou_type):
    gt, preds = random_lvis(seed, crowded=crowded)
    expected = lvis_directly(gt, preds, tmp_path, iou_type)
    dataset = read_dataset(gt)
    found = run_lvis(dataset, read_results(preds, dataset, iou_type=iou_type), iou_type=iou_type)
    assert {name: found.metrics[ours] for name, ours in OURS.items()} == pytest.approx(
        expected.results, abs=1e-9
    )
    np.testing.assert_allclose(found.precision[..., 0], expected.eval["precision"], atol=1e-9, rtol=0)
    np.testing.assert_allclose(found.recall[..., 0], expected.eval["recall"], atol=1e-9, rtol=0)
    if crowded:
        per_image = np.bincount([pred["image_id"] for pred in preds])
        assert per_image.max() > 300
    assert len({found.metrics[name] for name in ("APr", "APc", "APf", "AP")}) == 4


def test_the_command_finds_lvis_data_and_prints_its_numbers(tmp_path, lvis_numpy, capsys):
    gt, preds = random_lvis(5)
    expected = lvis_directly(gt, preds, tmp_path).results
    metrics = evaluated(tmp_path, gt, preds)
    assert metrics["lvis"] == pytest.approx(expected, abs=1e-9)
    assert {name: metrics[ours] for name, ours in OURS.items()} == metrics["lvis"]
    printed = capsys.readouterr().out
    assert "by the rules of LVIS" in printed
    assert f"APr {expected['APr']:.3f}  APc {expected['APc']:.3f}  APf {expected['APf']:.3f}" in printed
    as_coco = evaluated(tmp_path, gt, preds, "--no-lvis")
    assert as_coco["AP"] != pytest.approx(metrics["AP"], abs=1e-3)
    assert as_coco.keys().isdisjoint({"APr", "lvis"})


def test_from_an_lvis_file_through_records_and_predictions_to_the_numbers(tmp_path, lvis_numpy):
    gt, _ = random_lvis(8, num_images=12)
    (tmp_path / "lvis.json").write_text(json.dumps(gt))
    assert (
        run("data", "from-lvis", "--annotations", tmp_path / "lvis.json", "--output", tmp_path / "d.jsonl")
        == 0
    )
    records = read_jsonl(tmp_path / "d.jsonl")
    names = {category["id"]: category["name"].replace("_", " ") for category in gt["categories"]}
    image = next(image for image in gt["images"] if image["not_exhaustive_category_ids"])
    record = next(record for record in records if record.metadata["image_id"] == image["id"])
    assert record.metadata["neg_categories"] == [names[n] for n in image["neg_category_ids"]]
    assert record.metadata["not_exhaustive_categories"] == [
        names[n] for n in image["not_exhaustive_category_ids"]
    ]
    frequency = {names[category["id"]]: category["frequency"] for category in gt["categories"]}
    assert record.metadata["category_frequencies"] == {
        obj.desc: frequency[obj.desc] for obj in record.objects
    }
    # Every object of the next picture is predicted in this one: some classes are right, absent, or never looked for.
    rng = np.random.default_rng(0)
    lines = []
    for number, record in enumerate(records):
        both = (*record.objects, *records[number - 1].objects)
        line = artifact_line(record, number, nothing_parsed(), None)
        scores = rng.random(len(both)).round(2).tolist()
        line["pred"] = objects_of(both, record.width, record.height, scores).rows(scored=True)
        lines.append(line | {"pred_score_source": "test", "pred_score_version": 1})
    write_jsonl(tmp_path / "run" / SCORED, lines)
    assert run("eval", "--run", tmp_path / "run") == 0
    metrics, exported_gt, exported_preds = (
        json.loads((tmp_path / "run" / name).read_text())
        for name in ("metrics.json", "coco_gt.json", "coco_preds.json")
    )
    assert metrics["settings"]["lvis"] is True
    for category in exported_gt[
        "categories"
    ]:  # the package wants it of all; those without objects count nowhere
        category.setdefault("frequency", "f")
    expected = lvis_directly(exported_gt, exported_preds, tmp_path).results
    assert {name: metrics[ours] for name, ours in OURS.items()} == pytest.approx(expected, abs=1e-9)
    assert 0 < metrics["APr"] < 1


def nothing_parsed() -> ParsedRollout:
    return ParsedRollout([], [], [], "", [], "", 0, False, False, False, {})


BOX, AWAY = [10.0, 10.0, 50.0, 50.0], [200.0, 200.0, 50.0, 50.0]


def one_image(negative=(), not_exhaustive=()):
    """A cat of common frequency; dogs may be absent, unknown or annotated in part."""
    return {
        "images": [
            {"id": 1, "width": 640, "height": 480, "file_name": "a.png", "neg_category_ids": list(negative),
             "not_exhaustive_category_ids": list(not_exhaustive)},
            {"id": 2, "width": 640, "height": 480, "file_name": "b.png", "neg_category_ids": [],
             "not_exhaustive_category_ids": []},
        ],
        "categories": [{"id": 1, "name": "cat", "frequency": "c"}, {"id": 2, "name": "dog", "frequency": "r"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": BOX, "area": 2500},
            {"id": 2, "image_id": 2, "category_id": 2, "bbox": BOX, "area": 2500},
        ],
    }  # fmt: skip


def result(image, category, box, score):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def lvis_metrics(gt, preds):
    dataset = read_dataset(gt)
    return run_lvis(dataset, read_results(preds, dataset)).metrics


def test_a_class_counts_in_an_image_where_it_was_looked_for():
    preds = [result(1, 2, AWAY, 0.9), result(2, 2, BOX, 0.5)]  # a dog in the cat's image, ranked first
    assert lvis_metrics(one_image(), preds)["APr"] == pytest.approx(1.0)  # nobody looked for dogs there
    assert lvis_metrics(one_image(negative=[2]), preds)["APr"] == pytest.approx(0.5)  # there is none


def test_further_boxes_of_a_class_that_is_annotated_in_part_do_not_count():
    preds = [result(1, 1, AWAY, 0.9), result(1, 1, BOX, 0.5)]
    assert lvis_metrics(one_image(), preds)["APc"] == pytest.approx(0.5)
    assert lvis_metrics(one_image(not_exhaustive=[1]), preds)["APc"] == pytest.approx(1.0)


def test_what_lvis_needs_is_asked_for_by_name(tmp_path, capsys):
    gt = one_image()
    del gt["images"][1]["neg_category_ids"]
    assert (
        evaluated(tmp_path, gt, [])["settings"]["lvis"] is False
    )  # not every image says what it was checked for
    assert run_coco_files(tmp_path, gt, [], "--lvis") == 2
    assert "gt.json: images[1] (id 2) has no neg_category_ids" in capsys.readouterr().err
    for changed, message in (
        ({"images": [{**one_image()["images"][0], "neg_category_ids": [7]}, one_image()["images"][1]]},
         r"gt.json: images\[0\].neg_category_ids names category id 7, which is not there"),
        ({"categories": [{"id": 1, "name": "cat", "frequency": "often"}, {"id": 2, "name": "dog"}]},
         r"gt.json: categories\[0\].frequency \(cat\) is 'often': LVIS evaluation needs one of r, c, f"),
    ):  # fmt: skip
        dataset = read_dataset(one_image() | changed, prefix="gt.json: ")
        with pytest.raises(RecordError, match=message):
            run_lvis(dataset, read_results([], dataset))
    for settings in (EvalSettings(engine="pycocotools"), EvalSettings(max_dets=(1, 10, 100))):
        dataset = read_dataset(one_image())
        with pytest.raises(ConfigError, match="say --no-lvis for COCO numbers"):
            settings.average_precision(dataset, read_results([], dataset))


def evaluated(folder: Path, gt, preds, *more):
    assert run_coco_files(folder, gt, preds, *more) == 0
    return json.loads((folder / "out" / "metrics.json").read_text())


def run_coco_files(folder: Path, gt, preds, *more) -> int:
    (folder / "gt.json").write_text(json.dumps(gt))
    (folder / "preds.json").write_text(json.dumps(preds))
    return run(
        "eval", "--format", "coco", "--gt", folder / "gt.json", "--pred", folder / "preds.json", "--output",
        folder / "out", *more,
    )  # fmt: skip


def run(*argv: object) -> int:
    return main([str(item) for item in argv])
