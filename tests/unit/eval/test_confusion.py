"""Who is taken for whom, by hand, and where it has to agree with F1."""

from __future__ import annotations

import numpy as np
import pytest
from support.images import image_result

from coordexp.eval.box_matching import BoxSet
from coordexp.eval.detection import match_boxes
from coordexp.eval.errors.confusion import confusion_matrix
from coordexp.eval.predictions.image_result import ImageResult

SQUARE, MOVED, FAR = [0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [50.0, 50.0, 60.0, 60.0]


def random_images(seed: int, *, crowd: bool) -> list[ImageResult]:
    rng = np.random.default_rng(seed)

    def objects(most: int):
        corner, side = rng.uniform(0, 30, (rng.integers(0, most), 2)), rng.uniform(8, 40)
        return [("abc"[rng.integers(3)], [*xy, *(xy + side)]) for xy in corner]

    images = []
    for image_id in range(8):
        gt, pred = objects(7), objects(9)
        flags = [crowd and bool(rng.random() < 0.3) for _ in gt]
        scored = [(*one, float(rng.random())) for one in pred]
        images.append(image_result(image_id, 80, 80, gt, scored, crowd=flags))
    return images


@pytest.mark.parametrize("crowd", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_diagonal_is_what_f1_matches_and_margins_are_all_there_is(seed, crowd):
    images = random_images(seed, crowd=crowd)
    confusion = confusion_matrix(images)
    at_50 = match_boxes(BoxSet.of(images), (0.5,)).at(0.5)
    for desc, (tp, fp, fn) in at_50.per_class.items():
        assert confusion.count(desc, desc) == tp
        assert sum(n for (gt, _), n in confusion.counts.items() if gt == desc) == tp + fn
        assert sum(n for (_, pred), n in confusion.counts.items() if pred == desc) >= tp + fp - crowd * len(
            images
        )
    wrong = sum(n for (gt, pred), n in confusion.counts.items() if gt != pred and pred is not None)
    assert wrong >= at_50.counts.fp
    if not crowd:
        assert wrong == at_50.counts.fp


def test_equal_descriptions_come_first_and_the_rest_goes_by_overlap():
    images = [
        image_result(
            0, 99, 99, [("cat", SQUARE), ("dog", MOVED)], [("dog", SQUARE, 0.9), ("cow", MOVED, 0.8)]
        ),
        image_result(1, 99, 99, [("cat", SQUARE)], [("cat", FAR, 0.9), ("cow", FAR, 0.1)]),
    ]
    confusion = confusion_matrix(images, min_score=0.2)
    assert confusion.counts == {
        ("dog", "dog"): 1,  # though "cat" fits the prediction better
        ("cat", "cow"): 1,
        ("cat", None): 1,
        (None, "cat"): 1,  # "cow" is below the score
    }
    assert confusion.images[("cat", "cow")] == [0]
    assert confusion.images[("cat", None)] == confusion.images[(None, "cat")] == [1]
    assert confusion.most_confused(2) == ["cat", "cow"]


def test_a_prediction_in_a_crowd_of_its_kind_is_in_no_cell():
    [image] = [
        image_result(
            0, 99, 99, [("cat", [0, 0, 40, 40])], [("cat", SQUARE, 0.9), ("dog", SQUARE, 0.9)], crowd=[True]
        )
    ]
    assert confusion_matrix([image]).counts == {(None, "dog"): 1}
