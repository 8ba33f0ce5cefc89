"""Planted label errors are found, ranked and named; honest errors of a model are not."""

from __future__ import annotations

import pytest
from support.images import image_result

from coordexp.eval.errors.label_errors import LabelErrorKind, label_error_record, label_errors

A, B, C = [0.0, 0.0, 20.0, 20.0], [40.0, 0.0, 60.0, 20.0], [0.0, 40.0, 20.0, 60.0]


def one(gt, *preds, **options):
    """Findings on one image, of one model for every list of predictions."""
    answers = [[image_result(0, 100, 80, gt, pred, file_name="a.png", **options)] for pred in preds]
    return label_errors(answers, min_scores=[0.3] * len(preds))


def test_each_kind_with_its_score_and_reason():
    gt = [("cat", A), ("cat", B), ("dog", C)]
    pred = [("cat", A, 0.9), ("cow", C, 0.8), ("bird", [70.0, 50.0, 90.0, 70.0], 0.7)]
    wrong, alone, unseen = one(gt, pred)
    assert (wrong.kind, wrong.desc, wrong.annotated) == (LabelErrorKind.WRONG_NAME, "cow", "dog")
    assert wrong.score == pytest.approx(0.8)
    assert wrong.reason == "annotated as dog, predicted as cow with score 0.80 (IoU 1.00)"
    assert (alone.kind, alone.desc, alone.annotated) == (LabelErrorKind.UNANNOTATED, "bird", None)
    assert alone.score == pytest.approx(0.7)
    assert (unseen.kind, unseen.box_xyxy) == (LabelErrorKind.NOT_FOUND, tuple(B))
    assert unseen.score == pytest.approx(0.5)  # one of two cats is found
    assert unseen.reason.endswith("50% of the annotations of cat are found")


def test_what_is_no_suspicion():
    assert one([("cat", A)], [("cat", A, 0.9)]) == []
    assert one([("cat", A)], [("cat", A, 0.2), ("dog", A, 0.9)]) == []  # the model says both
    assert one([], [("dog", A, 0.2)]) == []  # not confident
    assert one([("cat", A)], [("cat", [0.0, 0.0, 20.0, 50.0], 0.9)]) == []  # too large, IoU 0.4
    assert one([("cat", A)], [("cow", [2.0, 2.0, 10.0, 10.0], 0.9)], crowd=[True]) == []
    both = [("rider", A), ("horse", [0.0, 0.0, 20.0, 21.0])]
    assert one(both, [("rider", A, 0.9), ("horse", A, 0.9)]) == []  # on objects of their own


def test_models_that_agree_make_one_finding():
    [found] = one([], [("dog", A, 0.6), ("dog", [0.0, 0.0, 20.0, 21.0], 0.5)], [("dog", A, 0.9)], [])
    assert (found.score, found.num_models) == (pytest.approx(0.9), 2)
    assert found.reason.endswith("2 of 3 runs say so")
    assert one([("cat", A), ("cat", B)], [("cat", A, 0.9)], [("cat", B, 0.9)]) == []  # somebody found each


def test_a_record_stays_inside_the_picture_and_has_an_extent(tmp_path):
    gt = [("cat", A)]
    image = image_result(
        7, 100, 80, gt, [("dog", [99.0, 70.0, 130.0, 90.0], 0.9), ("cat", A, 0.9)], file_name="a.png"
    )
    [found] = label_errors([[image]], min_scores=[0.3])
    record = label_error_record(found, [image], tmp_path / "data" / "images", tmp_path / "reports")
    assert record["images"] == ["../data/images/a.png"]
    [obj] = record["objects"]
    assert obj == {"desc": "dog", "bbox_2d": [998, 885, 999, 999]}
    assert record["metadata"]["box_xyxy"] == [99.0, 70.0, 130.0, 90.0]
    assert record["metadata"]["image_id"] == 7
