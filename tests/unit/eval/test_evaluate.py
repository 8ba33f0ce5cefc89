"""From scored lines to metrics: truths that must hold, hand-worked numbers, refused input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from coordexp.errors import RecordError
from coordexp.eval.artifacts import SCORED, write_jsonl
from coordexp.eval.evaluate import evaluate_directory, evaluate_lines, read_scored


def obj(desc, *points, score=None):
    made = {"type": "bbox_2d", "points": [float(p) for p in points], "desc": desc}
    return made if score is None else {**made, "score": score}


def line(image_id, gt, pred):
    return {
        "image_id": image_id, "image": f"{image_id}.png", "width": 100, "height": 100, "coord_mode": "pixel",
        "gt": gt, "pred": pred, "pred_score_source": "test", "pred_score_version": 1,
    }  # fmt: skip


GT = [
    [obj("cat", 0, 0, 40, 40), obj("dog", 50, 50, 90, 90)],
    [obj("cat", 10, 10, 60, 60)],
    [],
]


def with_scores(objects, score=0.9):
    return [{**o, "score": score} for o in objects]


def test_perfect_predictions():
    metrics = evaluate_lines([line(i, gt, with_scores(gt)) for i, gt in enumerate(GT)])
    for key in ("f1_at_50", "precision_at_50", "recall_at_50", "f1_50_95", "AP", "AP50", "AP_const"):
        assert metrics[key] == pytest.approx(1.0), key


def test_no_predictions():
    metrics = evaluate_lines([line(i, gt, []) for i, gt in enumerate(GT)])
    assert (metrics["f1_at_50"], metrics["recall_at_50"], metrics["AP"]) == (0.0, 0.0, 0.0)


def test_hand_worked_scene():
    # cat found with IoU 0.625 (a hit at 0.50 0.55 0.60), dog under a wrong name, second cat missed, one box on an
    # empty image: tp 1, fp 2, fn 2.
    lines = [
        line(0, GT[0], [obj("cat", 0, 0, 40, 25, score=0.8), obj("cow", 50, 50, 90, 90, score=0.7)]),
        line(1, GT[1], []),
        line(2, GT[2], [obj("cat", 1, 1, 9, 9, score=0.1)]),
    ]
    metrics = evaluate_lines(lines)
    assert metrics["precision_at_50"] == pytest.approx(1 / 3)
    assert metrics["recall_at_50"] == pytest.approx(1 / 3)
    assert metrics["f1_at_50"] == pytest.approx(1 / 3)
    assert metrics["f1_50_95"] == pytest.approx(3 * (1 / 3) / 10)
    # Without the names the cow is the dog: tp 2, fp 1, fn 1 up to 0.60, then tp 1, fp 2, fn 2.
    assert metrics["box_f1_at_50"] == pytest.approx(2 / 3)
    assert metrics["box_f1_50_95"] == pytest.approx((3 * 2 / 3 + 7 * 1 / 3) / 10)
    assert metrics["dropped_unknown_desc"] == 1  # "cow" is no category of the ground truth
    assert metrics["per_class_at_50"]["dog"] == {"tp": 0, "fp": 0, "fn": 1}


def test_constant_scores_forget_the_ranking():
    # The false positive has the lower score: ranked last it costs nothing, with equal scores it comes first.
    good, bad = obj("cat", 10, 10, 60, 60, score=0.9), obj("cat", 70, 70, 90, 90, score=0.1)
    metrics = evaluate_lines([line(1, GT[1], [bad, good])])
    assert metrics["AP"] == pytest.approx(1.0)
    assert metrics["AP_const"] == pytest.approx(0.5)


def test_directory_holds_files_that_pycocotools_scores_the_same(tmp_path: Path, capsys):
    preds = [
        [obj("cat", 0, 0, 40, 30, score=0.6), obj("dog", 52, 50, 90, 92, score=0.3)],
        with_scores(GT[1]),
        [],
    ]
    write_jsonl(
        tmp_path / SCORED, [line(i, gt, pred) for i, (gt, pred) in enumerate(zip(GT, preds, strict=True))]
    )
    metrics = evaluate_directory(tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    coco = COCO(str(tmp_path / "coco_gt.json"))
    evaluation = COCOeval(coco, coco.loadRes(str(tmp_path / "coco_preds.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert metrics["AP"] == pytest.approx(evaluation.stats[0], abs=1e-12)
    assert metrics["AP50"] == pytest.approx(evaluation.stats[1], abs=1e-12)


def test_unscored_input_names_the_command_that_scores_it(tmp_path: Path):
    unscored = line(0, GT[0], [])
    del unscored["pred_score_source"]
    write_jsonl(tmp_path / SCORED, [unscored])
    with pytest.raises(RecordError, match="coordexp score --run"):
        read_scored(tmp_path / SCORED)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([line(0, [], [{**GT[1][0], "score": "high"}])], r":1: pred\[0\] has score 'high'"),
        ([line(0, [], []), line(0, [], [])], r":2: image_id 0 stands in line 1"),
        ([{**line(0, [], []), "coord_mode": "norm1000"}], r":1: coord_mode is 'norm1000', expected 'pixel'"),
        ([line(0, [{"points": [0, 0, 1, 1]}], [])], r":1: gt\[0\] lacks desc"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, lines, message):
    write_jsonl(tmp_path / SCORED, lines)
    with pytest.raises(RecordError, match=message):
        read_scored(tmp_path / SCORED)


def test_descriptions_with_unicode_line_separators_survive_the_file(tmp_path: Path):
    gt = [obj("a\u2028b\u0085c", 0, 0, 40, 40)]
    write_jsonl(tmp_path / SCORED, [line(0, gt, with_scores(gt))])
    assert read_scored(tmp_path / SCORED)[0]["gt"] == gt
