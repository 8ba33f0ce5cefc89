"""Calibration of scores: hand-worked errors, parity with scikit-learn, and what is held out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.isotonic import IsotonicRegression
from support.images import image_result

from coordexp.eval.box_matching import BoxSet
from coordexp.eval.calibration import (
    NUM_SCORE_BINS,
    Calibration,
    calibration_error,
    calibration_of,
    held_out_isotonic,
    reliability,
)
from coordexp.eval.detection import match_boxes

BOX, FAR = (0, 0, 100, 10), (500, 500, 600, 600)
WIDE = (0, 0, 60, 10)  # IoU 0.6 with BOX


def test_the_error_by_hand():
    # Three bins. Up to 1/3: scores .1 and .3, one right: |.5 - .2| * 2. Above 2/3: .9 and .7, both right: .2 * 2.
    # In the middle .5, wrong: .5. Together (.6 + .5 + .4) / 5.
    scores, right = np.array([0.1, 0.9, 0.3, 0.5, 0.7]), np.array([True, True, False, False, True])
    bins = reliability(scores, right, num_bins=3)
    assert [row.num for row in bins] == [2, 1, 2]
    assert [row.precision for row in bins] == [0.5, 0.0, 1.0]
    assert calibration_error(bins) == pytest.approx(0.3)


def test_a_bin_holds_its_upper_edge():
    found = reliability(np.array([0.0, 0.5, 1.0]), np.array([True] * 3), num_bins=2)
    assert [(row.low, row.high, row.num) for row in found] == [(0.0, 0.5, 2), (0.5, 1.0, 1)]


def of_images(images) -> dict[float, Calibration | None]:
    scores = np.concatenate([image.pred.scores_N for image in images])
    second = np.arange(len(images)) % 2 == 1
    f1 = match_boxes(BoxSet.of(images))
    return {iou: calibration_of(f1, scores, second, iou) for iou in (0.5, 0.75)}


def image(number, gt, pred, scores, crowd=None):
    scored = [(*obj, score) for obj, score in zip(pred, scores, strict=True)]
    return image_result(number, 1000, 1000, gt, scored, crowd=crowd)


def test_right_is_a_match_of_box_and_description():
    found = of_images(
        [
            image(0, [("cat", BOX), ("dog", FAR)], [("cat", WIDE), ("cat", FAR)], [0.8, 0.6]),
            image(
                1, [("cat", BOX), ("cat", FAR)], [("cat", BOX), ("cat", FAR)], [1.0, 0.2], crowd=[False, True]
            ),
        ]
    )
    half, tight = found[0.5], found[0.75]
    assert (half.num, tight.num) == (3, 3)  # the last prediction lies in a crowd region
    assert half.precision == pytest.approx(2 / 3)
    assert tight.precision == pytest.approx(1 / 3)  # WIDE fits no more
    assert half.mean_score == pytest.approx(0.8)
    assert half.ece == pytest.approx((0.2 + 0.6 + 0.0) / 3)
    assert tight.ece == pytest.approx((0.8 + 0.6 + 0.0) / 3)


def test_scores_that_are_no_probabilities_have_no_calibration():
    assert of_images([image(0, [("cat", BOX)], [("cat", BOX)], [1.5])]) == {0.5: None, 0.75: None}
    assert of_images([image(0, [("cat", BOX)], [], [])]) == {0.5: None, 0.75: None}
    one = of_images([image(0, [("cat", BOX)], [("cat", BOX)], [0.9])])[0.5]
    assert one.ece == pytest.approx(0.1)
    assert (one.ece_isotonic, one.isotonic_bins) == (None, ())  # nothing is held out


samples = st.integers(2, 200).flatmap(
    lambda n: st.tuples(
        st.lists(st.sampled_from([0.0, 0.05, 0.2, 0.21, 0.5, 0.77, 1.0]), min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n),
    )
)


@settings(max_examples=60, deadline=None)
@given(samples)
def test_parity_with_scikit_learn(sample):
    scores, right, second = (np.array(column) for column in sample)
    bins = reliability(scores, right)
    precision, score = calibration_curve(right, scores, n_bins=NUM_SCORE_BINS)
    assert [row.precision for row in bins] == pytest.approx(precision.tolist())
    assert [row.score for row in bins] == pytest.approx(score.tolist())
    mapped = held_out_isotonic(scores, right, second)
    if second.all() or not second.any():
        assert mapped is None
        return
    for held_out in (second, ~second):
        fit = IsotonicRegression(out_of_bounds="clip").fit(scores[~held_out], right[~held_out])
        np.testing.assert_allclose(mapped[held_out], fit.predict(scores[held_out]), atol=1e-12)


def test_a_fit_on_other_images_mends_a_wrong_scale():
    """Scores are the square of the chance to be right: they rank well, but say too little."""
    rng = np.random.default_rng(0)
    chance = rng.random(4000)
    scores, right = chance**2, rng.random(4000) < chance
    mapped = held_out_isotonic(scores, right, np.arange(4000) % 2 == 1)
    assert calibration_error(reliability(scores, right)) == pytest.approx(1 / 6, abs=0.02)  # E[p - p^2]
    assert calibration_error(reliability(mapped, right)) < 0.04
