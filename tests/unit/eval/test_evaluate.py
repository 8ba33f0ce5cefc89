"""From scored lines to metrics: truths that must hold, hand-worked numbers, refused input."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from coordexp.errors import RecordError
from coordexp.eval.evaluate import (
    EvalSettings,
    ScoredSet,
    evaluate,
    evaluate_directory,
    write_evaluation,
)
from coordexp.eval.on_policy import on_policy_numbers
from coordexp.eval.predictions.artifacts import SCORED
from coordexp.eval.predictions.image_result import Objects, duplicate_rate
from coordexp.eval.predictions.scored import read_predictions
from coordexp.files import write_jsonl


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


def images_of(lines, folder):
    """The images of these lines of a predictions file."""
    write_jsonl(folder / SCORED, lines)
    return read_predictions(folder / SCORED)


def evaluated(lines, folder, settings=None, **options):
    return evaluate(ScoredSet("run", images_of(lines, folder)), settings, **options)


def with_scores(objects, score=0.9):
    return [{**o, "score": score} for o in objects]


def test_perfect_predictions(tmp_path: Path):
    metrics = evaluated([line(i, gt, with_scores(gt)) for i, gt in enumerate(GT)], tmp_path).metrics
    for key in ("f1_at_50", "precision_at_50", "recall_at_50", "f1_50_95", "AP", "AP50", "AP_const"):
        assert metrics[key] == pytest.approx(1.0), key


def test_no_predictions(tmp_path: Path):
    metrics = evaluated([line(i, gt, []) for i, gt in enumerate(GT)], tmp_path).metrics
    assert (metrics["f1_at_50"], metrics["recall_at_50"], metrics["AP"]) == (0.0, 0.0, 0.0)


def test_hand_worked_scene(tmp_path: Path):
    # cat found with IoU 0.625 (a hit at 0.50 0.55 0.60), dog under a wrong name, second cat missed, one box on an
    # empty image: tp 1, fp 2, fn 2.
    lines = [
        line(0, GT[0], [obj("cat", 0, 0, 40, 25, score=0.8), obj("cow", 50, 50, 90, 90, score=0.7)]),
        line(1, GT[1], []),
        line(2, GT[2], [obj("cat", 1, 1, 9, 9, score=0.1)]),
    ]
    metrics = evaluated(lines, tmp_path).metrics
    assert metrics["precision_at_50"] == pytest.approx(1 / 3)
    assert metrics["recall_at_50"] == pytest.approx(1 / 3)
    assert metrics["f1_at_50"] == pytest.approx(1 / 3)
    assert metrics["f1_50_95"] == pytest.approx(3 * (1 / 3) / 10)
    # Without the names the cow is the dog: tp 2, fp 1, fn 1 up to 0.60, then tp 1, fp 2, fn 2.
    assert metrics["box_f1_at_50"] == pytest.approx(2 / 3)
    assert metrics["box_f1_50_95"] == pytest.approx((3 * 2 / 3 + 7 * 1 / 3) / 10)
    assert metrics["dropped_unknown_desc"] == 1  # "cow" is no category of the ground truth
    assert metrics["per_class_at_50"]["dog"] == {"tp": 0, "fp": 0, "fn": 1}


def test_constant_scores_forget_the_ranking(tmp_path: Path):
    # The false positive has the lower score: ranked last it costs nothing, with equal scores it comes first.
    good, bad = obj("cat", 10, 10, 60, 60, score=0.9), obj("cat", 70, 70, 90, 90, score=0.1)
    metrics = evaluated([line(1, GT[1], [bad, good])], tmp_path).metrics
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
        read_predictions(tmp_path / SCORED)


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
        read_predictions(tmp_path / SCORED)


def test_descriptions_with_unicode_line_separators_survive_the_file(tmp_path: Path):
    gt = [obj("a\u2028b\u0085c", 0, 0, 40, 40)]
    write_jsonl(tmp_path / SCORED, [line(0, gt, with_scores(gt))])
    assert read_predictions(tmp_path / SCORED)[0].gt.rows(scored=False) == gt


def test_f1_takes_any_thresholds_and_either_scope(tmp_path: Path):
    # IoU 0.4 with the cat; the cow is of a class that this image does not hold.
    lines = [line(0, GT[0], [obj("cat", 0, 0, 40, 16, score=0.8), obj("cow", 50, 50, 90, 90, score=0.7)])]
    both = EvalSettings(iou_thresholds=(0.3,)), EvalSettings(iou_thresholds=(0.3,), scope="annotated")
    everything, annotated = (evaluated(lines, tmp_path, settings).metrics for settings in both)
    assert [row["iou"] for row in everything["f1_by_iou"]] == pytest.approx(
        [0.3, *np.arange(0.5, 0.96, 0.05)]
    )
    low = everything["f1_by_iou"][0]
    assert [low[key] for key in ("tp", "fp", "fn", "precision", "recall", "f1")] == [1, 1, 1, 0.5, 0.5, 0.5]
    assert low["macro_classes"]["f1"] == 0.5  # cat 1, dog 0; the cow has no ground truth
    assert low["matched_iou_mean"] == pytest.approx(0.4)
    assert annotated["f1_by_iou"][0]["precision"] == 1.0
    assert everything["f1_50_95"] == annotated["f1_50_95"] == 0.0  # the extra threshold stays out of the mean


def test_tables_by_image_by_class_and_by_size(tmp_path: Path):
    gt = [obj("cat", 0, 0, 20, 20), obj("dog", 0, 0, 50, 50), obj("dog", 0, 0, 99, 99)]
    pred = [obj("dog", 0, 0, 50, 50, score=0.9), obj("cow", 0, 0, 9, 9, score=0.1)]
    evaluation = evaluated([{**line(7, gt, pred), "errors": {"wrong_arity": 2}}], tmp_path)
    image = evaluation.per_image[0]
    assert [image[key] for key in ("image_id", "tp", "fp", "fn")] == [7, 1, 1, 2]
    assert image["counts"] == [[1, 1, 2]] * 10
    assert [o["matched"] for o in image["gt"]] == [None, 0, None]
    assert [o["matched"] for o in image["pred"]] == [1, None]
    rows = {row["desc"]: row for row in evaluation.per_class}
    assert [rows["dog"][key] for key in ("num_gt", "num_pred", "tp", "fp", "fn", "recall")] == [
        2,
        1,
        1,
        0,
        1,
        0.5,
    ]
    assert rows["dog"]["AP"] == pytest.approx(51 / 101)  # recall 0.5 reaches 51 of the 101 recall points
    assert rows["dog"]["AP_small"] is None
    assert (rows["cat"]["AP"], rows["cow"]["AP"], rows["cow"]["num_pred"]) == (0.0, None, 1)
    assert {size: row["num_gt"] for size, row in evaluation.metrics["by_size"].items()} == {
        "small": 1, "medium": 1, "large": 1,
    }  # fmt: skip
    assert evaluation.metrics["by_size"]["medium"]["AR"] == 1.0
    assert evaluation.metrics["drop_reasons"] == {"wrong_arity": 2}


def test_written_files_hold_the_tables(tmp_path: Path):
    evaluation = evaluated([line(i, gt, with_scores(gt)) for i, gt in enumerate(GT)], tmp_path)
    write_evaluation(evaluation, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "metrics.json", "per_image.json", "per_class.csv", "desc_mapping.json", "coco_gt.json", "coco_preds.json",
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "per_image.json").read_text()) == evaluation.per_image
    with (tmp_path / "out" / "per_class.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["desc"], row["num_gt"], float(row["AP"])) for row in rows] == [
        ("cat", "2", pytest.approx(1.0)), ("dog", "1", pytest.approx(1.0)),
    ]  # fmt: skip
    assert rows[0]["AP_small"] == ""


def test_mapped_descriptions_count_in_ap_and_f1_and_unmapped_ones_are_false_positives(tmp_path: Path):
    pred = [obj("CAT ", 0, 0, 40, 40, score=0.9), obj("unicorn", 50, 50, 90, 90, score=0.8)]
    evaluation = evaluated([line(0, GT[0], pred)], tmp_path)
    assert (evaluation.metrics["mapped_desc"], evaluation.metrics["dropped_unknown_desc"]) == (1, 1)
    assert evaluation.metrics["f1_at_50"] == 0.5
    assert evaluation.metrics["AP"] == pytest.approx(0.5)  # cat 1, dog 0
    assert len(evaluation.coco_preds) == 1
    assert evaluation.per_image[0]["pred"][0]["desc"] == "cat"
    assert evaluation.per_image[0]["pred"][0]["written_desc"] == "CAT "
    assert evaluation.mapping.report()["dropped"] == [
        {"desc": "unicorn", "nearest": None, "similarity": None, "count": 1}
    ]


def test_missing_image_files_are_counted(tmp_path: Path):
    (tmp_path / "1.png").touch()
    lines = [line(i, gt, with_scores(gt)) for i, gt in enumerate(GT)]
    assert evaluated(lines, tmp_path, image_root=tmp_path).metrics["num_images_missing"] == 2
    assert evaluated(lines, tmp_path).metrics["num_images_missing"] is None
    with pytest.raises(RecordError, match="is no folder"):
        evaluated(lines, tmp_path, image_root=tmp_path / "nowhere")


def test_masks_of_polygons_and_boxes(tmp_path: Path):
    # Two triangles make a square: each has half its mask, and all of its box.
    square, triangle = (10, 10, 50, 50), (10, 10, 50, 10, 10, 50)
    lines = [line(0, [obj("sail", *square)], [obj("sail", *triangle, score=0.5)])]
    boxes, masks = (evaluated(lines, tmp_path, EvalSettings(iou_type=t)).metrics for t in ("bbox", "segm"))
    assert (boxes["AP50"], boxes["AP"]) == pytest.approx((1.0, 1.0))
    assert masks["AP75"] == 0.0
    assert masks["f1_at_50"] == 1.0


@pytest.mark.parametrize("written", ["cafe\u0301", " caf\u00e9", "caf\u00e9\n"])
def test_unicode_forms_and_blanks_at_the_ends_are_one_description(tmp_path: Path, written: str):
    lines = [line(0, [obj("caf\u00e9", 0, 0, 40, 40)], [obj(written, 0, 0, 40, 40, score=0.5)])]
    for settings in (EvalSettings(), EvalSettings(scope="annotated")):
        metrics = evaluated(lines, tmp_path, settings).metrics
        assert (metrics["AP"], metrics["f1_at_50"], metrics["f1_50_95"]) == pytest.approx((1.0, 1.0, 1.0))
        assert (metrics["mapped_desc"], metrics["dropped_unknown_desc"]) == (0, 0)
        assert list(metrics["per_class_at_50"]) == ["caf\u00e9"]
    assert evaluated(lines[::-1], tmp_path).per_image[0]["pred"][0]["written_desc"] == written
    lines[0]["gt"], lines[0]["pred"] = lines[0]["pred"], with_scores(lines[0]["gt"])
    assert evaluated(lines, tmp_path).metrics["AP"] == pytest.approx(1.0)
    assert on_policy_numbers(images_of(lines, tmp_path))["desc_acc"] == 1.0


def test_class_averages_leave_out_zeros_and_duplicates_are_counted(tmp_path: Path):
    # cat: precision 1/2 (the second is a duplicate), recall 1/2; dog: found; bird: missed, left out of both means.
    gt = [
        [obj("cat", 0, 0, 40, 40), obj("dog", 50, 50, 90, 90)],
        [obj("cat", 0, 0, 9, 9), obj("bird", 5, 5, 90, 90)],
    ]
    pred = [
        [
            obj("cat", 0, 0, 40, 40),
            obj("cat", 0, 0, 40, 39),
            obj("dog", 50, 50, 90, 90),
            obj("cow", 0, 0, 40, 40),
        ],
        [],
    ]
    lines = [line(i, g, with_scores(p)) for i, (g, p) in enumerate(zip(gt, pred, strict=True))]
    metrics = evaluated(lines, tmp_path).metrics
    for name in ("class_averaged_f1_at_50", "class_averaged_f1_at_95", "class_averaged_f1_50_95"):
        assert metrics[name] == pytest.approx((1 / 2 + 1) / 2)  # mean precision and mean recall are both 3/4
    assert metrics["f1_at_95"] == pytest.approx(2 * 2 / (4 + 4))
    assert metrics["duplicate_rate_mean"] == pytest.approx((1 / 4 + 0) / 2)
    assert metrics["duplicate_rate_p99"] == pytest.approx(0.25 * 0.99)


WIDTHS = st.sampled_from([100, 99, 95, 91, 90, 89, 50])
"""Of boxes of one height and corner: their IoU is the share of the widths."""


@given(st.lists(st.tuples(st.sampled_from(["cat", "dog", " cat"]), WIDTHS), max_size=8))
def test_a_duplicate_repeats_an_earlier_object_of_its_description(written: list[tuple[str, int]]):
    repeats = [
        any(
            desc.strip() == other.strip() and min(width, wide) / max(width, wide) > 0.9
            for other, wide in written[:i]
        )
        for i, (desc, width) in enumerate(written)
    ]
    objects = Objects.of([desc for desc, _ in written], [[0, 0, width, 10] for _, width in written])
    assert duplicate_rate(objects) == pytest.approx(sum(repeats) / max(1, len(written)))
