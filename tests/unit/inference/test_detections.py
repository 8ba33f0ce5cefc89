"""What a detection is in other tools' words, and which objects of an answer are left out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coordexp.config.schema.prompt import DEFAULT_PROMPT, Prompt
from coordexp.errors import ConfigError, RecordError
from coordexp.eval.coco.evaluate import evaluate_coco
from coordexp.image_size import PixelLimits
from coordexp.inference.asked_pictures import AskedPicture, asked_pictures
from coordexp.inference.class_names import checked_classes, prompt_for
from coordexp.inference.detections import Detections, detections_of, scoring_of
from coordexp.inference.picture_room import PictureRoom

# 1000 pixels a side: a bin is a pixel.
PICTURE = AskedPicture.of(np.full((1000, 1000, 3), 255, dtype=np.uint8), name="white.png")
OBJECTS = (("Cat", [10, 20, 110, 220]), ("dog", [0, 0, 999, 500]), ("cat", [600, 600, 700, 650]))


def answered(objects=OBJECTS, errors=None, classes=None, finish_reason="stop") -> Detections:
    """An answer of a server without log-probabilities: every score is 1.0."""
    pred = [{"type": "bbox_2d", "points": list(map(float, points)), "desc": desc} for desc, points in objects]
    line = {
        "image_id": 0, "image": "white.png", "width": 1000, "height": 1000, "coord_mode": "pixel", "gt": [],
        "pred": pred, "errors": errors or {},
    }  # fmt: skip
    trace = {
        "image_id": 0, "image": "white.png", "text": "…", "generated_token_text": ["{"], "token_logprobs": [],
        "object_token_positions": [[0]] * len(pred), "object_desc_token_positions": [[0]] * len(pred),
        "finish_reason": finish_reason,
    }  # fmt: skip
    return detections_of(PICTURE, line, trace, classes)


def test_boxes_bins_and_labels():
    found = answered()
    assert found.xyxy.tolist() == [[10, 20, 110, 220], [0, 0, 999, 500], [600, 600, 700, 650]]
    assert found.bins.tolist() == found.xyxy.tolist()
    assert found.labels == ("Cat", "dog", "cat")
    assert found.scores.tolist() == [1.0, 1.0, 1.0]
    assert (found.score_source, found.dropped, found.truncated, found.invalid) == (
        "constant",
        {},
        False,
        False,
    )


def test_other_classes_are_dropped_and_counted_beside_what_the_parser_dropped():
    found = answered(errors={"bbox_invalid": 2, "truncated": 1}, classes=("cat", "bird"))
    assert found.labels == ("cat", "cat")  # as they are asked for
    assert found.xyxy[:, 0].tolist() == [10, 600]
    assert found.dropped == {"bbox_invalid": 2, "not_in_classes": 1}
    assert found.truncated
    assert found.class_ids() == {"cat": 0, "bird": 1}


def test_a_guided_answer_that_was_closed_at_its_limit_was_cut():
    assert answered(finish_reason="length").truncated


def test_coco_results_have_corners_as_sizes_and_the_ids_that_are_asked_for():
    found = answered()
    entries = found.to_coco(7, {"CAT": 3, "dog": 18})
    assert [(entry["image_id"], entry["category_id"]) for entry in entries] == [(7, 3), (7, 18), (7, 3)]
    assert entries[0]["bbox"] == [10, 20, 100, 200]
    assert [entry["category_id"] for entry in found.to_coco(7, ["dog", "cat"])] == [2, 1, 2]
    coco = [{"id": 90, "name": "cat"}, {"id": 4, "name": "dog"}]
    assert [entry["category_id"] for entry in found.to_coco(7, coco)] == [90, 4, 90]
    with pytest.raises(RecordError, match="'dog' is none of the 1 categories"):
        found.to_coco(7, ["cat"])


def test_perfect_detections_have_average_precision_1():
    found = answered(classes=("cat", "dog"))
    boxes = found.to_coco(1)
    gt = {
        "images": [{"id": 1, "width": 1000, "height": 1000, "file_name": "white.png"}],
        "annotations": [
            {"id": n, **entry, "area": entry["bbox"][2] * entry["bbox"][3], "iscrowd": 0}
            for n, entry in enumerate(boxes, start=1)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    assert evaluate_coco(gt, boxes)["AP"] == pytest.approx(1.0)


def test_an_outline_keeps_its_points():
    found = answered([("leaf", [10, 10, 60, 10, 35, 80])])
    assert found.xyxy.tolist() == [[10, 10, 60, 80]]
    (entry,) = found.to_coco(1)
    assert entry["segmentation"] == [[10, 10, 60, 10, 35, 80]]
    assert json.loads(found.to_json())["objects"][0]["polygon"] == [10, 10, 60, 10, 35, 80]


def test_supervision_reads_them():
    supervision = pytest.importorskip("supervision")
    found = answered(classes=("dog", "cat")).to_supervision()
    assert isinstance(found, supervision.Detections)
    assert found.xyxy.tolist() == [[10, 20, 110, 220], [0, 0, 999, 500], [600, 600, 700, 650]]
    assert found.class_id.tolist() == [1, 0, 1]
    assert found["class_name"].tolist() == ["cat", "dog", "cat"]
    assert len(answered([]).to_supervision()) == 0


def test_json_holds_what_is_needed_to_draw_them_again():
    found = json.loads(answered(classes=["dog"]).to_json())
    assert (found["image"], found["width"], found["height"]) == ("white.png", 1000, 1000)
    assert found["objects"] == [
        {"label": "dog", "score": 1.0, "xyxy": [0, 0, 999, 500], "bins": [0, 0, 999, 500]}
    ]
    assert found["dropped"] == {"not_in_classes": 2}


def test_a_drawn_box_lies_on_its_pixels_and_classes_differ_in_colour():
    drawn = np.asarray(answered().draw(max_side=None))
    assert drawn.shape == (1000, 1000, 3)
    cat, dog = drawn[220, 50].tolist(), drawn[500, 300].tolist()  # in the lower edges
    assert [255, 255, 255] not in (cat, dog)
    assert cat != dog
    assert drawn[400, 300].tolist() == [255, 255, 255]  # inside the dog
    assert answered().draw(max_side=500).size == (500, 500)


def test_scores_are_the_best_that_an_answer_allows():
    boxes, outline = {"pred": [{"points": [0, 0, 1, 1]}]}, {"pred": [{"points": [0, 0, 1, 1, 2, 2]}]}
    trace = {"generated_token_text": ["a"], "token_logprobs": [-0.1]}
    assert scoring_of(boxes, trace).method == "logprob"
    assert scoring_of(boxes, {**trace, "coord_distributions": {}}).method == "expected_iou"
    assert scoring_of(outline, {**trace, "coord_distributions": {}}).method == "logprob"
    assert scoring_of(boxes, {**trace, "token_logprobs": []}).method == "constant"


class TestQuestion:
    def test_names_stand_in_the_question(self):
        asked = prompt_for(Prompt(), None, checked_classes(["cat", "traffic light"]))
        assert (
            asked.user == "Detect all objects in the image that belong to these classes: cat, traffic light."
        )
        assert prompt_for(Prompt(user="Boxes!"), None, ["cat"]).user == "Boxes! Classes: cat."
        assert prompt_for(Prompt(), "Where is a {classes}?", ["cat", "dog"]).user == "Where is a cat, dog?"

    def test_without_names_it_is_as_trained_or_as_given(self):
        assert prompt_for(Prompt(), None, None).user == DEFAULT_PROMPT
        assert prompt_for(Prompt(system="S"), "Cars?", None) == Prompt(system="S", user="Cars?")

    def test_what_cannot_be_asked(self):
        with pytest.raises(ConfigError, match="no classes are given"):
            prompt_for(Prompt(), "Where is a {classes}?", None)
        with pytest.raises(ConfigError, match=r"such as \['cat'\]"):
            checked_classes("cat")
        with pytest.raises(ConfigError, match="classes is empty"):
            checked_classes([])

    def test_a_name_counts_once(self):
        assert checked_classes(["Cat", " dog ", "cat"]) == ("Cat", "dog")


class TestPictures:
    def test_file_picture_and_array_are_the_same_pixels(self, tmp_path: Path):
        pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        turned = Image.fromarray(pixels)
        exif = Image.Exif()
        exif[0x0112] = 6
        turned.save(tmp_path / "turned.png", exif=exif)
        with Image.open(tmp_path / "turned.png") as opened:
            found = [AskedPicture.of(one) for one in (tmp_path / "turned.png", opened, np.rot90(pixels, -1))]
        assert [(one.width, one.height) for one in found] == [(40, 60)] * 3
        for one in found:
            np.testing.assert_array_equal(np.asarray(one.open()), np.rot90(pixels, -1))
        assert [one.name for one in found] == [str(tmp_path / "turned.png"), "picture", "picture"]

    def test_each_that_cannot_be_asked_about_says_why(self, tmp_path: Path):
        (tmp_path / "text.jpg").write_text("<html>")
        Image.new("RGB", (1, 300)).save(tmp_path / "thin.png")
        room = PictureRoom(PixelLimits(32 * 32, 32 * 32 * 100, 32), 4, "the model")
        given = [
            tmp_path / "text.jpg", tmp_path / "none.jpg", tmp_path / "thin.png", "https://host/a.jpg",
            np.zeros((8, 8, 3)), np.zeros((320, 320, 3), np.uint8), np.zeros((64, 64), np.uint8),
        ]  # fmt: skip
        found = asked_pictures([(None, one) for one in given], room)
        reasons = [
            "it is no picture", "does not exist", "an aspect ratio of 300", "pictures are not downloaded",
            "is an array of float64", "100 visual tokens, but the model leaves room for 4",
        ]  # fmt: skip
        for error, reason in zip(found, reasons, strict=False):
            assert reason in str(error)
        assert isinstance(found[-1], AskedPicture)
