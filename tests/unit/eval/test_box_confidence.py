"""The expected IoU of a box against an enumeration of all true boxes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.eval import expected_iou
from coordexp.eval.predictions.box_confidence import expected_ious, probs_of_atoms


def iou(a, b):
    """By hand, an empty box overlaps nothing."""
    overlap = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [max(0, c[2] - c[0]) * max(0, c[3] - c[1]) for c in (a, b)]
    union = sum(areas) - overlap
    return 1.0 if tuple(a) == tuple(b) else overlap / union if union else 0.0


def enumerated(probs, box):
    """Every combination of four bins, weighted by its probability."""
    supports = [np.flatnonzero(row) for row in probs]
    return sum(
        iou(box, bins) * np.prod([probs[side][k] for side, k in enumerate(bins)])
        for bins in itertools.product(*supports)
    )


def one_hot(*bins, size=1000):
    return np.eye(size)[list(bins)]


@pytest.mark.parametrize("box", [(10, 20, 300, 400), (0, 0, 999, 999), (5, 5, 6, 6), (7, 7, 7, 7)])
def test_a_box_the_model_is_sure_of_has_exactly_one(box):
    assert expected_iou(one_hot(*box), box) == 1.0


def test_a_sure_box_read_elsewhere_has_its_iou():
    # 10 x 10 against 10 x 5: half of it
    assert expected_iou(one_hot(100, 100, 110, 105), (100, 100, 110, 110)) == pytest.approx(0.5, abs=1e-12)
    assert expected_iou(one_hot(200, 200, 210, 210), (100, 100, 110, 110)) == 0.0
    assert expected_iou(one_hot(110, 100, 100, 110), (100, 100, 110, 110)) == 0.0  # sides swapped: empty


def test_a_coin_over_one_side():
    # x2 is 110 or 120 with equal chance: (1 + 1/2) / 2
    probs = one_hot(100, 100, 110, 110)
    probs[2] = (one_hot(110)[0] + one_hot(120)[0]) / 2
    assert expected_iou(probs, (100, 100, 110, 110)) == pytest.approx(0.75, abs=1e-3)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_it_is_the_sum_over_all_true_boxes(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    sharpness = data.draw(st.sampled_from([0.3, 1.0, 5.0]))
    probs = rng.dirichlet(np.full(8, sharpness), size=4)
    corners = sorted(rng.integers(0, 8, 2)), sorted(rng.integers(0, 8, 2))
    box = (corners[0][0], corners[1][0], corners[0][1], corners[1][1])
    assert expected_iou(probs, box) == pytest.approx(enumerated(probs, box), abs=4e-3)


def test_many_boxes_are_what_each_is_alone_and_rows_need_not_sum_to_one():
    rng = np.random.default_rng(1)
    probs = rng.dirichlet(np.full(20, 0.5), size=(300, 4))
    boxes = np.sort(rng.integers(0, 20, (300, 2, 2)), axis=1).reshape(300, 4)
    together = expected_ious(probs * 7.0, boxes)
    alone = [expected_iou(p, b) for p, b in zip(probs, boxes, strict=True)]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-12)
    assert len(expected_ious(np.zeros((0, 4, 20)), np.zeros((0, 4)))) == 0


def test_what_is_no_distribution_is_refused():
    box = (0, 0, 5, 5)
    for fault in (-1.0, np.nan, np.inf):
        probs = one_hot(*box)
        probs[1, 3] = fault
        with pytest.raises(ValueError, match="negative, not finite or sums to nothing"):
            expected_iou(probs, box)
    with pytest.raises(ValueError, match=r"expected \[4, K\]"):
        expected_iou(np.ones((3, 10)), box)


def test_atoms_are_a_distribution():
    probs = probs_of_atoms([3, 5, 3], [0.2, 0.2, 0.1], num_bins=8)
    np.testing.assert_allclose(probs, [0, 0, 0, 0.6, 0, 0.4, 0, 0])
