"""`coordexp eval` on plain COCO files and on runs: printed numbers, written files, refused input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.coco_reference import pycocotools_directly, random_pair

from coordexp.cli.main import main
from coordexp.eval.coco.evaluate import ENGINES, METRIC_NAMES
from coordexp.eval.predictions.artifacts import SCORED
from coordexp.files import write_jsonl

FIXTURE = Path(__file__).parents[2] / "fixtures" / "coco_val2014_100"
REAL_GT = FIXTURE / "instances_val2014_100.json"
REAL_PREDS = FIXTURE / "instances_val2014_fakebbox100_results.json"


def coco_eval(gt: Path, pred: Path, output: Path, *more: object) -> int:
    argv = ["eval", "--format", "coco", "--gt", gt, "--pred", pred, "--output", output, *more]
    return main([str(item) for item in argv])


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, value) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


@pytest.mark.parametrize("engine", ENGINES)
def test_the_real_pair_prints_the_known_numbers(tmp_path: Path, capsys, engine):
    assert coco_eval(REAL_GT, REAL_PREDS, tmp_path / "out", "--engine", engine) == 0
    printed = capsys.readouterr().out
    for number in ("AP 0.505", "AP50 0.697", "AP75 0.573", "AR100 0.595", "9 crowd regions"):
        assert number in printed
    metrics = read(tmp_path / "out" / "metrics.json")
    assert (metrics["num_images"], metrics["num_gt"], metrics["num_pred"]) == (100, 830, 734)
    written, given = read(tmp_path / "out" / "coco_gt.json"), read(REAL_GT)
    for part in ("images", "annotations", "categories"):
        assert [entry["id"] for entry in written[part]] == [entry["id"] for entry in given[part]]
    per_image = read(tmp_path / "out" / "per_image.json")
    assert sum(image["tp"] for image in per_image) == metrics["f1_by_iou"][0]["tp"]
    assert sum(obj.get("crowd", False) for image in per_image for obj in image["gt"]) == 9


def test_numbers_are_those_of_pycocotools_on_the_exported_files_for_every_engine(tmp_path: Path):
    gt, preds = random_pair(500, seed=21)
    gt_file, pred_file = write(tmp_path / "gt.json", gt), write(tmp_path / "preds.json", preds)
    found = []
    for engine in ENGINES:
        output = tmp_path / engine
        assert coco_eval(gt_file, pred_file, output, "--engine", engine) == 0
        metrics = read(output / "metrics.json")
        exported = read(output / "coco_gt.json"), read(output / "coco_preds.json")
        expected = pycocotools_directly(*exported)
        assert [metrics[name] for name in METRIC_NAMES] == pytest.approx(expected, abs=1e-9)
        const = pycocotools_directly(exported[0], [{**pred, "score": 1.0} for pred in exported[1]])
        assert list(metrics["const_scores"].values()) == pytest.approx(const, abs=1e-9)
        found.append(metrics)
    assert found[0]["AP"] != found[0]["AP_const"]
    for metrics in found[1:]:
        for row, other in zip(found[0]["per_class"], metrics["per_class"], strict=True):
            assert row == pytest.approx(other, abs=1e-9, nan_ok=True)
        curves = [np.array(m["pr_curves"]["precision_50_95"]) for m in (found[0], metrics)]
        np.testing.assert_allclose(*curves, atol=1e-9)


def test_masks_of_results_without_boxes(tmp_path: Path):
    triangle = [10.0, 10.0, 60.0, 10.0, 10.0, 60.0]
    gt = {
        "images": [{"id": 4, "width": 100, "height": 90, "file_name": "a.png"}],
        "categories": [{"id": 2, "name": "sail"}],
        "annotations": [
            {"id": 1, "image_id": 4, "category_id": 2, "bbox": [10, 10, 50, 50], "area": 1250,
             "segmentation": [triangle]},
        ],
    }  # fmt: skip
    preds = [{"image_id": 4, "category_id": 2, "segmentation": [triangle], "score": 0.5}]
    gt_file, pred_file = write(tmp_path / "gt.json", gt), write(tmp_path / "preds.json", preds)
    assert coco_eval(gt_file, pred_file, tmp_path / "out", "--iou-type", "segm") == 0
    assert read(tmp_path / "out" / "metrics.json")["AP"] == pytest.approx(1.0)
    image = read(tmp_path / "out" / "per_image.json")[0]
    assert image["pred"][0]["points"] == pytest.approx([10, 10, 60, 60], abs=1)
    assert (image["image"], image["tp"]) == ("a.png", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": float("nan")}, "preds.json: preds[1].score is nan"),
        ({"score": None}, "preds.json: preds[1] has no score"),
        ({"category_id": 77}, "preds.json: preds[1].category_id is 77, not one of the 3 categories"),
        ({"image_id": 404}, "preds.json: preds[1].image_id is 404, not one of the 20 images of"),
        ({"bbox": [0, 0, -1, 2]}, "preds.json: preds[1].bbox is [0, 0, -1, 2]"),
    ],
)
def test_a_bad_result_is_named_with_its_file(tmp_path: Path, capsys, change, message):
    gt, preds = random_pair(20, seed=2)
    preds[1] = {**preds[1], **change}
    gt_file, pred_file = write(tmp_path / "gt.json", gt), write(tmp_path / "preds.json", preds)
    assert coco_eval(gt_file, pred_file, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda gt: gt["images"].append(gt["images"][0]), "images[20] repeats id 3"),
        (lambda gt: gt["annotations"][2].update(category_id=6), "annotations[2].category_id (id 3) is 6"),
        (lambda gt: gt["categories"][1].update(name="cat"), "are both named 'cat'"),
        (lambda gt: gt.pop("categories"), "has no categories"),
    ],
)
def test_a_bad_ground_truth_is_named_with_its_file(tmp_path: Path, capsys, change, message):
    gt, preds = random_pair(20, seed=2)
    change(gt)
    gt_file, pred_file = write(tmp_path / "gt.json", gt), write(tmp_path / "preds.json", preds)
    assert coco_eval(gt_file, pred_file, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert str(gt_file) in error
    assert message in error


def test_masks_are_refused_where_the_ground_truth_has_none(tmp_path: Path, capsys):
    gt, preds = random_pair(20, seed=2)
    gt_file, pred_file = write(tmp_path / "gt.json", gt), write(tmp_path / "preds.json", preds)
    assert coco_eval(gt_file, pred_file, tmp_path / "out", "--iou-type", "segm") == 2
    assert "annotations[0] (id 1) has no segmentation" in capsys.readouterr().err


def test_files_that_are_no_coco_files(tmp_path: Path, capsys):
    broken = tmp_path / "broken.json"
    broken.write_text('{"images": [],\n "annotations": ]', encoding="utf-8")
    assert coco_eval(broken, REAL_PREDS, tmp_path / "out") == 2
    assert f"{broken}:2: not valid JSON" in capsys.readouterr().err
    assert coco_eval(tmp_path / "none.json", REAL_PREDS, tmp_path / "out") == 2
    assert "none.json: cannot be read (No such file" in capsys.readouterr().err
    assert coco_eval(REAL_GT, REAL_GT, tmp_path / "out") == 2
    assert "expected a list of results" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give --run RUN"),
        (["--run", "a", "--gt", "b"], "give --run RUN"),
        (["--format", "coco", "--gt", "b"], "--pred, --output missing"),
        (["--format", "coco", "--gt", "b", "--pred", "c", "--output", "d", "--run", "e"], "--run belongs"),
    ],
)
def test_arguments_that_do_not_go_together(capsys, argv, message):
    assert main(["eval", *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_run_with_its_baseline_as_first_row(tmp_path: Path, capsys):
    def lines(*points: float) -> list[dict]:
        gt = {"type": "bbox_2d", "points": [0.0, 0.0, 40.0, 40.0], "desc": "cat"}
        return [
            {
                "image_id": 0, "image": "0.png", "width": 100, "height": 100, "coord_mode": "pixel", "gt": [gt],
                "pred": [{**gt, "points": list(points), "score": 0.5}], "errors": {"truncated": 1},
                "pred_score_source": "test", "pred_score_version": 1,
            }
        ]  # fmt: skip

    for name, points in (("tuned", (0.0, 0.0, 40.0, 40.0)), ("untuned", (60.0, 60.0, 90.0, 90.0))):
        write_jsonl(tmp_path / name / SCORED, lines(*points))
    argv = ["eval", "--run", tmp_path / "tuned", "--baseline", tmp_path / "untuned", "--image-root", tmp_path]
    assert main([str(item) for item in argv]) == 0
    printed = capsys.readouterr().out
    assert printed.index("baseline") < printed.index("this run")
    assert "1 image files missing" in printed
    assert "dropped before evaluation: truncated 1" in printed
    metrics = read(tmp_path / "tuned" / "metrics.json")
    assert (metrics["AP"], metrics["baseline"]["AP"]) == pytest.approx((1.0, 0.0))
    assert not (tmp_path / "untuned" / "metrics.json").exists()
