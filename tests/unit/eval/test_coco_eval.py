"""COCO numbers: against both engines run directly, a brute-force AP written here, a real pair of files."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from support.coco_reference import brute_force_ap, pycocotools_directly, random_pair
from support.images import image_result

from coordexp.errors import ConfigError, RecordError
from coordexp.eval.coco.evaluate import (
    ENGINES,
    METRIC_NAMES,
    evaluate_coco,
    run_coco,
)
from coordexp.eval.coco.from_images import coco_of

FIXTURE = Path(__file__).parents[2] / "fixtures" / "coco_val2014_100"


@pytest.fixture(scope="module")
def real_pair():
    gt = json.loads((FIXTURE / "instances_val2014_100.json").read_text())
    return gt, json.loads((FIXTURE / "instances_val2014_fakebbox100_results.json").read_text())


@pytest.mark.parametrize("engine", ENGINES)
def test_the_real_pair_gives_the_known_numbers(real_pair, engine):
    metrics = evaluate_coco(*real_pair, engine=engine)
    assert [round(metrics[name], 3) for name in ("AP", "AP50", "AP75", "AR100")] == [
        0.505,
        0.697,
        0.573,
        0.595,
    ]
    assert tuple(metrics) == METRIC_NAMES


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("engine", ENGINES)
def test_all_twelve_numbers_equal_pycocotools_run_directly(real_pair, engine, iou_type):
    metrics = evaluate_coco(*real_pair, engine=engine, iou_type=iou_type)
    np.testing.assert_allclose(
        list(metrics.values()), pycocotools_directly(*real_pair, iou_type), atol=1e-9, rtol=0
    )


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "pycocotools"])
@pytest.mark.parametrize(("num_images", "max_dets"), [(500, (1, 10, 100)), (60, (1, 2, 3)), (7, (5,))])
def test_tables_are_those_of_pycocotools_with_ties_crowds_and_empty_images(engine, num_images, max_dets):
    gt, preds = random_pair(num_images, seed=11 + num_images)
    crowded = preds + [{**pred, "score": pred["score"] / 2} for pred in preds]
    found, expected = (run_coco(gt, crowded, engine=e, max_dets=max_dets) for e in (engine, "pycocotools"))
    np.testing.assert_allclose(found.precision, expected.precision, atol=1e-9, rtol=0)
    np.testing.assert_allclose(found.recall, expected.recall, atol=1e-9, rtol=0)
    if max_dets == (1, 10, 100):
        assert list(expected.metrics.values()) == pycocotools_directly(gt, crowded)


@pytest.mark.parametrize("engine", ENGINES)
def test_ap_equals_its_definition_worked_by_brute_force(engine):
    gt, preds = random_pair(12, seed=4)
    distinct = [{**pred, "score": 1.0 - rank / len(preds)} for rank, pred in enumerate(preds)]
    assert evaluate_coco(gt, distinct, engine=engine)["AP"] == pytest.approx(
        brute_force_ap(gt, distinct), abs=1e-9
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_perfect_detections_have_ap_1_and_a_shift_by_one_pixel_what_brute_force_gives(engine):
    gt, _ = random_pair(20, seed=5)
    gt["annotations"] = [{**annotation, "iscrowd": 0} for annotation in gt["annotations"]]
    perfect = [
        {key: annotation[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9 - rank / 1000}
        for rank, annotation in enumerate(gt["annotations"])
    ]
    metrics = evaluate_coco(gt, perfect, engine=engine)
    assert [metrics[name] for name in ("AP", "AP50", "AP75", "AR100")] == pytest.approx([1.0] * 4, abs=1e-9)
    shifted = [{**p, "bbox": [p["bbox"][0] + 1, p["bbox"][1] + 1, *p["bbox"][2:]]} for p in perfect]
    shifted_ap = evaluate_coco(gt, shifted, engine=engine)["AP"]
    assert 0.3 < shifted_ap < 1.0
    assert shifted_ap == pytest.approx(brute_force_ap(gt, shifted), abs=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_detections_give_zeros_and_no_ground_truth_gives_minus_one(engine):
    gt, preds = random_pair(10, seed=6)
    nothing_found = evaluate_coco(gt, [], engine=engine)
    assert set(nothing_found.values()) == {0.0}
    nothing_to_find = evaluate_coco({**gt, "annotations": []}, preds, engine=engine)
    assert set(nothing_to_find.values()) == {-1.0}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_inputs_stay_as_they_are_and_the_console_stays_quiet(real_pair, engine, iou_type, capfd):
    gt, preds = real_pair
    gt_before, preds_before = copy.deepcopy(gt), copy.deepcopy(preds)
    evaluate_coco(gt, preds, engine=engine, iou_type=iou_type)
    assert (gt, preds) == (gt_before, preds_before)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("engine", ENGINES)
def test_an_annotation_with_id_0_can_be_found(engine):
    gt = {
        "images": [{"id": 0, "width": 100, "height": 100}],
        "annotations": [{"id": 0, "image_id": 0, "category_id": 1, "bbox": [10, 10, 40, 40]}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    preds = [{"image_id": 0, "category_id": 1, "bbox": (10, 10, 40, 40), "score": 1}]
    assert evaluate_coco(gt, preds, engine=engine)["AP"] == pytest.approx(1.0)


def test_segmentations_without_boxes_may_be_polygons_or_run_lengths():
    triangle = [10.0, 10.0, 60.0, 10.0, 10.0, 60.0]
    gt = coco_dicts(image_result(1, 100, 100, [("sail", triangle)]))[0]
    run_length = coco_mask.merge(coco_mask.frPyObjects([triangle], 100, 100))
    for segmentation in ([triangle], run_length):
        preds = [{"image_id": 1, "category_id": 1, "segmentation": segmentation, "score": 0.5}]
        assert evaluate_coco(gt, preds, iou_type="segm")["AP"] == pytest.approx(1.0)


def test_per_category_ap_averages_to_ap_and_leaves_out_what_has_no_ground_truth():
    gt, preds = random_pair(60, seed=8)
    by_engine = [run_coco(gt, preds, engine=engine) for engine in ENGINES]
    for evaluation in by_engine:
        per_category = evaluation.per_category_ap()
        assert set(per_category) == {"cat", "dog"}
        assert np.mean(list(per_category.values())) == pytest.approx(evaluation.metrics["AP"], abs=1e-12)
        assert evaluation.precision.shape == (10, 101, 3, 4, 3)
    only_cats = [pred for pred in preds if pred["category_id"] == 5]
    assert by_engine[0].per_category_ap()["cat"] == run_coco(gt, only_cats).per_category_ap()["cat"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": float("nan")}, r"preds\[1\]\.score is nan: expected a finite number"),
        ({"score": None}, r"preds\[1\] has no score.*coordexp score"),
        ({"image_id": 404}, r"preds\[1\]\.image_id is 404, not one of the 2 images"),
        ({"category_id": 7}, r"preds\[1\]\.category_id is 7, not one of the 1 categories"),
        ({"bbox": [1, 2, 3]}, r"preds\[1\]\.bbox is \[1, 2, 3\]"),
        ({"bbox": [1, 2, -3, 4]}, r"preds\[1\]\.bbox is \[1, 2, -3, 4\]"),
        ({"bbox": [1, 2, float("inf"), 4]}, r"preds\[1\]\.bbox"),
    ],
)
def test_a_bad_result_is_named_by_its_index(change, message):
    images = [
        image_result(i, 50, 50, [("cat", (1, 1, 20, 20))], [("cat", (1, 1, 20, 20), 0.5)]) for i in (1, 2)
    ]
    gt, preds = coco_dicts(*images)
    preds = [preds[0], {**preds[1], **change}]
    with pytest.raises(RecordError, match=message):
        evaluate_coco(gt, preds)


def test_a_bad_ground_truth_is_named():
    gt = coco_dicts(image_result(1, 50, 50, [("cat", (1, 1, 20, 20))]))[0]
    with pytest.raises(RecordError, match="has no categories"):
        evaluate_coco({key: gt[key] for key in ("images", "annotations")}, [])
    with pytest.raises(RecordError, match=r"images\[1\] repeats id 1"):
        evaluate_coco({**gt, "images": gt["images"] * 2}, [])
    with pytest.raises(RecordError, match=r"annotations\[0\]\.image_id \(id 1\) is 3"):
        evaluate_coco({**gt, "annotations": [{**gt["annotations"][0], "image_id": 3}]}, [])


def test_unknown_engine_and_iou_type_are_refused():
    gt, preds = random_pair(2, seed=0)
    with pytest.raises(ConfigError, match="engine is 'detectron'"):
        evaluate_coco(gt, preds, engine="detectron")
    with pytest.raises(ConfigError, match="iou_type is 'keypoints'"):
        evaluate_coco(gt, preds, iou_type="keypoints")


def coco_dicts(*images):
    """The COCO data set and results of images, in COCO's form."""
    dataset, results = coco_of(images)
    return dataset.as_coco(segmentations=True), results.as_coco(segmentations=True)


def test_images_become_pixel_exact_boxes_and_sorted_categories():
    image = image_result(
        7, 640, 480, [("zebra", (10, 20, 30, 60)), ("ant", (0, 0, 5, 5))], [("ant", (1, 2, 4, 8), 0.25)]
    )
    empty = image_result(8, 100, 90, [], [("zebra", (0, 0, 9, 9), 0.5)], file_name="empty.png")
    gt, preds = coco_dicts(image, empty)
    assert gt["categories"] == [{"id": 1, "name": "ant"}, {"id": 2, "name": "zebra"}]
    assert gt["images"] == [
        {"id": 7, "width": 640, "height": 480, "file_name": ""},
        {"id": 8, "width": 100, "height": 90, "file_name": "empty.png"},
    ]
    assert [a["id"] for a in gt["annotations"]] == [1, 2]
    zebra = gt["annotations"][0]
    assert (zebra["bbox"], zebra["area"], zebra["iscrowd"]) == ([10, 20, 20, 40], 800, 0)
    assert zebra["segmentation"] == [[10, 20, 30, 20, 30, 60, 10, 60]]
    assert preds == [
        {"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 6], "score": 0.25},
        {"image_id": 8, "category_id": 2, "bbox": [0, 0, 9, 9], "score": 0.5},
    ]


def test_polygons_have_a_segmentation_a_box_and_their_own_area():
    triangle = (10, 10, 50, 10, 10, 40)
    gt, preds = coco_dicts(image_result(1, 99, 99, [("sail", triangle)], [("sail", triangle, 1.0)]))
    annotation, result = gt["annotations"][0], preds[0]
    assert (annotation["bbox"], annotation["area"]) == ([10, 10, 40, 30], 600)
    assert annotation["segmentation"] == result["segmentation"] == [list(triangle)]
    assert evaluate_coco(gt, preds, iou_type="segm")["AP"] == pytest.approx(1.0)


def test_crowd_regions_stay_crowd_regions():
    gt, _ = coco_dicts(
        image_result(1, 99, 99, [("cat", (0, 0, 9, 9)), ("cat", (0, 0, 5, 5))], crowd=[False, True])
    )
    assert [a["iscrowd"] for a in gt["annotations"]] == [0, 1]


def test_predictions_that_are_no_category_are_left_out():
    box = (0, 0, 9, 9)
    preds = [("unicorn", box, 0.7), ("cat", box, 0.8), ("unicorn", box, 0.6)]
    _, found = coco_dicts(image_result(1, 20, 20, [("cat", box)], preds))
    assert [pred["score"] for pred in found] == [0.8]


def test_a_repeated_image_and_an_infinite_score_are_refused():
    first = image_result(4, 20, 20, [], [("dog", (0, 0, 9, 9), 0.5)] * 3)
    image = image_result(
        5, 20, 20, [("cat", (0, 0, 9, 9))], [("cat", (0, 0, 9, 9), 0.1), ("cat", (0, 0, 9, 9), float("inf"))]
    )
    with pytest.raises(RecordError, match=r"image 5 pred\[1\]\.score is inf"):
        coco_of([first, image])
    with pytest.raises(RecordError, match="repeat id 5"):
        coco_of([image, image])


@pytest.mark.parametrize("engine", ENGINES)
def test_other_detection_limits_are_those_of_pycocotools(engine):
    gt, preds = random_pair(40, seed=9)
    crowded = [
        {**pred, "score": pred["score"] / 2} for pred in preds
    ]  # so that limits of 2 and 3 cut something
    evaluation = run_coco(gt, preds + crowded, engine=engine, max_dets=(1, 2, 3))
    expected = pycocotools_directly(gt, preds + crowded, max_dets=[1, 2, 3])
    # pycocotools' own AP (its first number) only knows a limit of 100; AP50, AP75, AP by size and AR take the last.
    assert list(evaluation.metrics.values())[1:] == pytest.approx(expected[1:], abs=1e-9)
    assert [name for name in evaluation.metrics if name.startswith("AR")][:3] == ["AR1", "AR2", "AR3"]
    assert evaluation.metrics["AR3"] < run_coco(gt, preds + crowded, engine=engine).metrics["AR100"]


@pytest.mark.parametrize("limits", [(), (0, 10), (10, 1), (5, 5)])
def test_detection_limits_have_to_ascend(limits):
    with pytest.raises(ConfigError, match="max_dets are"):
        run_coco(*random_pair(2, seed=0), max_dets=limits)


@pytest.mark.parametrize("engine", ENGINES)
def test_numbers_by_class_are_those_of_pycocotools_on_that_class(engine):
    gt, preds = random_pair(60, seed=8)
    by_class = run_coco(gt, preds, engine=engine).per_category()
    for category_id, name in ((5, "cat"), (2, "dog")):
        expected = pycocotools_directly(gt, preds, category_ids=[category_id])
        assert list(by_class[name].values()) == pytest.approx(expected, abs=1e-9)


def test_precision_over_recall_averages_to_ap():
    evaluation = run_coco(*random_pair(60, seed=8))
    assert len(evaluation.pr_curve()) == 101
    for iou, name in ((None, "AP"), (0.5, "AP50"), (0.75, "AP75")):
        assert np.mean(evaluation.pr_curve(iou)) == pytest.approx(evaluation.metrics[name], abs=1e-12)
    assert run_coco({**random_pair(3, seed=1)[0], "annotations": []}, []).pr_curve() == []


@pytest.mark.parametrize("engine", ENGINES)
def test_masks_need_outlines_in_the_ground_truth_and_image_sizes(engine):
    gt, preds = random_pair(5, seed=3)
    with pytest.raises(RecordError, match=r"gt annotations\[0\] \(id 1\) has no segmentation.*bbox"):
        evaluate_coco(gt, preds, iou_type="segm", engine=engine)
    square = coco_dicts(image_result(1, 50, 50, [("cat", (1, 1, 20, 20))]))[0]
    with pytest.raises(RecordError, match=r"images\[0\] \(id 1\) has no width and height"):
        evaluate_coco({**square, "images": [{"id": 1}]}, [], iou_type="segm", engine=engine)
