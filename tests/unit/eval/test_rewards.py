"""Rewards of answers, worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from coordexp.codec.parse import parse_rollout
from coordexp.codec.schema import BoxObject
from coordexp.codec.serialize import serialize
from coordexp.eval.rewards import REWARDS, Rewards, rewards_of

CAT = BoxObject("cat", "bbox_2d", (0, 0, 499, 499))
DOG = BoxObject("dog", "bbox_2d", (500, 500, 999, 999))
LEFT_HALF = BoxObject("cat", "bbox_2d", (0, 0, 249, 499))
THIRD = BoxObject("cat", "bbox_2d", (0, 0, 166, 499))


@pytest.fixture(scope="module")
def tok(nano: Path):
    return AutoTokenizer.from_pretrained(nano)


def rewards(tok, text, objects, *, ended=True):
    return rewards_of(parse_rollout(tok.encode(text, add_special_tokens=False), tok), objects, ended=ended)


@pytest.mark.parametrize(
    ("written", "f1", "iou", "no_duplicates"),
    [
        ([CAT, DOG], 1, 1, 1),
        ([DOG, CAT], 1, 1, 1),  # the order is free
        ([CAT], 2 / 3, 2 / 3, 1),  # one of two found: precision 1, recall 1/2
        ([], 0, 0, 1),  # recall 0; what is not written is no duplicate
        ([CAT, CAT, DOG], 4 / 5, 4 / 5, 2 / 3),  # TP 2, FP 1; the second cat repeats the first
        ([BoxObject("dog", "bbox_2d", CAT.bins), DOG], 1 / 2, 1, 1),  # a wrong name finds nothing, but lies right
        ([LEFT_HALF, DOG], 1, (1 / 2 + 1) * 2 / 4, 1),  # half of the cat is just enough to find it
        ([THIRD, DOG], 1 / 2, (1 / 3 + 1) * 2 / 4, 1),
    ],
)  # fmt: skip
def test_by_hand(tok, written, f1, iou, no_duplicates):
    found = rewards(tok, serialize(written), [CAT, DOG])
    assert found == pytest.approx(Rewards(f1, iou, 1.0, no_duplicates), abs=0.01)  # masks are of whole pixels


def test_names_cannot_take_each_other_s_boxes(tok):
    """A cat and a dog at one place: matching by place alone might pair them crosswise."""
    pair = [CAT, BoxObject("dog", "bbox_2d", CAT.bins)]
    assert rewards(tok, serialize(pair[::-1]), pair).f1 == 1.0


def test_empty_sets_are_those_of_evaluation(tok):
    assert rewards(tok, '{"objects": []}', []) == (1.0, 1.0, 1.0, 1.0)
    assert rewards(tok, '{"objects": []}', [CAT]) == (0.0, 0.0, 1.0, 1.0)
    assert rewards(tok, serialize([CAT]), []) == (0.0, 0.0, 1.0, 1.0)
    assert rewards(tok, "nothing here", []) == (0.0, 0.0, 0.0, 0.0)  # no answer at all


@pytest.mark.parametrize(
    ("text", "ended", "expected"),
    [
        (serialize([CAT]), True, 1.0),
        (serialize([CAT]), False, 0.0),  # never stopped
        ("Sure: " + serialize([CAT]), True, 0.0),
        (serialize([CAT])[:-2], True, 0.0),  # the container is open
        (serialize([CAT]).replace('"desc"', '"name"'), True, 0.0),  # its only record is dropped
        (serialize([CAT, DOG]).replace("dog", ""), True, 0.5),  # one of two is
    ],
)
def test_format(tok, text, ended, expected):
    assert rewards(tok, text, [CAT], ended=ended).format == expected


# Sides of ten pixels of the canvas that masks are drawn on.
bins = st.integers(0, 959).flatmap(lambda low: st.tuples(st.just(low), st.integers(low + 40, 999)))
boxes = st.builds(
    lambda name, x, y: BoxObject(name, "bbox_2d", (x[0], y[0], x[1], y[1])), st.sampled_from("ab"), bins, bins
)


@settings(max_examples=25, deadline=None)
@given(written=st.lists(boxes, max_size=5), objects=st.lists(boxes, max_size=5))
def test_bounds_and_perfection(tok, written, objects):
    found = rewards(tok, serialize(written), objects)
    assert all(0.0 <= value <= 1.0 for value in found)
    assert found.format == 1.0
    perfect = rewards(tok, serialize(objects), objects)
    assert perfect.f1 == perfect.format == 1.0
    assert perfect.iou <= 1.0


def test_names():
    assert list(REWARDS) == ["coordexp_f1", "coordexp_iou", "coordexp_format", "coordexp_no_duplicates"]
