"""What K answers find together, by hand; the tables of a sweep."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordexp.errors import ContractError
from coordexp.eval.oracle import found_objects, oracle_of
from coordexp.eval.predictions.image_result import ImageResult, Objects
from coordexp.eval.sweep import oracle_table

BOXES = {"a": [0, 0, 9, 9], "b": [20, 20, 39, 39], "c": [50, 50, 59, 59]}
GT = [("cat", "a"), ("dog", "b"), ("cat", "c")]


def image(image_id, *pred, gt=GT, crowd=None):
    def objects(named, **more):
        return Objects.of([desc for desc, _ in named], [BOXES[box] for _, box in named], **more)

    return ImageResult(image_id, f"{image_id}.png", 64, 64, objects(gt, crowd=crowd), objects(pred))


def test_best_of_k_all_of_k_and_what_is_not_said():
    """Image 0: greedy finds the cat at a; sampled answers find {b}, {a, c}, {}. Image 1: {c}; {c}, {c, b}, {c}."""
    greedy = [image(0, ("cat", "a")), image(1, ("cat", "c"), ("dog", "a"))]
    answers = [
        [image(0, ("dog", "b")), image(1, ("cat", "c"))],
        [image(0, ("cat", "c"), ("cat", "a")), image(1, ("cat", "c"), ("dog", "b"))],
        [image(0, ("dog", "a")), image(1, ("cat", "c"), ("cat", "c"))],
    ]
    found = oracle_of(greedy, answers)
    assert (found.num_gt, found.num_greedy, found.num_each, found.num_best, found.num_any) == (
        6,
        2,
        (2, 4, 1),
        4,
        5,
    )
    assert [(one.image_id, one.gt_index, one.desc, one.num_found) for one in found.unsaid] == [
        (0, 1, "dog", 1), (0, 2, "cat", 1), (1, 1, "dog", 1),
    ]  # fmt: skip
    assert found.unsaid[0].box == (20, 20, 39, 39)
    told = found.as_json()
    assert told["recall_greedy"] == pytest.approx(2 / 6)
    assert told["recall_sampled"] == pytest.approx(7 / 18)
    assert told["recall_best_of_k"] == pytest.approx(4 / 6)
    assert told["recall_any_of_k"] == pytest.approx(5 / 6)
    row = oracle_table({"oracle": [{"name": "t0.7", **told}]})[1][0]
    assert row == ["t0.7", "0.333", "0.389", "0.667", "0.833", "3"]


def test_crowd_regions_and_empty_images_count_nowhere():
    crowd = image(0, ("cat", "a"), crowd=[True, False, False])
    assert found_objects(crowd, 0.5) == set()
    found = oracle_of([crowd], [[crowd]])
    assert (found.num_gt, found.num_any) == (2, 0)
    empty = image(0, gt=[])
    assert oracle_of([empty], [[empty]]).as_json()["recall_any_of_k"] is None


@given(
    st.lists(st.lists(st.sampled_from(GT), max_size=4), min_size=1, max_size=4), st.lists(st.sampled_from(GT))
)
def test_none_is_more_than_all_together(answers, said):
    found = oracle_of([image(0, *said)], [[image(0, *pred)] for pred in answers])
    assert max(found.num_each) == found.num_best <= found.num_any <= found.num_gt == 3
    assert found.num_any - found.num_greedy <= len(found.unsaid) <= found.num_any


def test_answers_to_other_images_are_refused():
    for answers in ([], [[image(1)]], [[image(0), image(1)]]):
        with pytest.raises(ContractError, match="not of the greedy answers' images"):
            oracle_of([image(0)], answers)
