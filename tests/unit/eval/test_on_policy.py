"""Numbers of answers, counted by hand."""

from __future__ import annotations

import pytest
from support.images import image_result

from coordexp.eval.on_policy import on_policy_numbers


def box(desc, *bins):
    """A box given in bins of a 1000-pixel image, where pixels and bins are the same."""
    return desc, tuple(float(k) for k in bins)


def line(gt, pred, **errors):
    return image_result(0, 1000, 1000, gt, pred, errors=errors)


def test_hand_counted_answers():
    lines = [
        # One right; one 4 bins off in one coordinate and misnamed; one record refused.
        line(
            [box("cat", 100, 100, 300, 300), box("dog", 500, 500, 800, 800)],
            [box("cat", 100, 100, 300, 300), box("cow", 504, 500, 800, 800)],
            bbox_invalid=1,
        ),
        # A miss and a false positive, and the answer was cut off.
        line([box("cat", 0, 0, 100, 100)], [box("cat", 600, 600, 900, 900)], truncated=1),
        # Nothing there, nothing said.
        line([], []),
    ]
    assert on_policy_numbers(lines, gate=0.5) == pytest.approx(
        {
            "rollout_precision": 2 / 3,
            "rollout_recall": 2 / 3,
            "rollout_f1": 2 / 3,
            "desc_acc": 1 / 2,
            "bin_error": (0 + 4 / 4) / 2,
            "parse_rate": 3 / 4,
            "answer_rate": 2 / 3,
        }
    )


def test_the_gate_decides_what_matches():
    lines = [line([box("cat", 0, 0, 100, 100)], [box("cat", 0, 0, 100, 60)])]
    assert on_policy_numbers(lines, gate=0.5)["rollout_f1"] == 1.0
    assert on_policy_numbers(lines, gate=0.7)["rollout_f1"] == 0.0


def test_nothing_at_all_is_perfect():
    numbers = on_policy_numbers([line([], [])])
    assert numbers["rollout_f1"] == 1.0
    assert "bin_error" not in numbers
