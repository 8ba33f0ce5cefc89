"""Repeat-aware termination against a brute-force reading of its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.codec.forms.choose import FORMS, form_of
from coordexp.codec.pieces import pieces_of
from coordexp.codec.schema import BoxObject
from coordexp.config.schema.rollout import RepeatTerminate
from coordexp.rollout.decoding.repetition import (
    RepeatDetector,
    RepeatTermination,
    is_repeating,
    was_terminated,
)

PIECES = [
    b'"', b"desc", b'"desc"', b'{"de', b'sc": "', b"x", b'"}, ', b'"label"', b"label", b"<|coord_1|>", b"<|coord_23|>",
]  # fmt: skip
END = 99


def rules(**values: object) -> RepeatTerminate:
    never = {
        "min_new_tokens": 0, "max_consecutive_token_repeats": 10**6, "ngram_size": 10**6, "ngram_repeats": 10**6,
    }  # fmt: skip
    return RepeatTerminate(enabled=True, **{**never, **values})


def brute_force(ids: list[int], r: RepeatTerminate) -> bool:
    """The definition, read off whole lists."""
    if len(ids) < r.min_new_tokens:
        return False
    run, size = r.max_consecutive_token_repeats, r.ngram_size
    if len(ids) >= run and len(set(ids[-run:])) == 1:
        return True
    if len(ids) >= size:
        places = [i for i in range(len(ids) - size + 1) if ids[i : i + size] == ids[-size:]]
        if len(places) >= r.ngram_repeats:
            return True
    text = b"".join(PIECES[i] for i in ids)
    descs, labels, coords, neighbours = (
        len([i for i in range(len(text)) if text.startswith(wanted, i)])
        for wanted in (b'"desc"', b'"label"', b"<|coord_", b"|><|coord_")
    )
    boxes = (coords + 3) // 4 if neighbours else 0
    return r.max_object_keys is not None and max(descs, labels, boxes) > r.max_object_keys


@settings(max_examples=300, deadline=None)
@given(
    ids=st.lists(st.integers(0, len(PIECES) - 1), max_size=40),
    minimum=st.integers(0, 12),
    run=st.integers(1, 6),
    size=st.integers(1, 5),
    repeats=st.integers(2, 4),
    keys=st.none() | st.integers(1, 4),
)
def test_every_prefix_is_decided_as_the_definition_says(ids, minimum, run, size, repeats, keys):
    r = rules(
        min_new_tokens=minimum, max_consecutive_token_repeats=run, ngram_size=size, ngram_repeats=repeats,
        max_object_keys=keys,
    )  # fmt: skip
    detector = RepeatDetector(r, PIECES.__getitem__)
    for length in range(1, len(ids) + 1):
        detector.extend(ids[length - 1 : length])
        assert detector.triggered == brute_force(ids[:length], r)
    assert is_repeating(ids, r, PIECES.__getitem__) == brute_force(ids, r)


@pytest.mark.parametrize(
    ("ids", "values", "first"),
    [
        # one token 4 times in a row
        ([1, 2, 2, 2, 2, 3], {"max_consecutive_token_repeats": 4}, 5),
        # not before min_new_tokens, and then only while it still holds
        ([2, 2, 2, 2, 2], {"max_consecutive_token_repeats": 2, "min_new_tokens": 5}, 5),
        ([2, 2, 2, 1, 3], {"max_consecutive_token_repeats": 2, "min_new_tokens": 4}, None),
        # a piece of 3 tokens, 3 times back to back
        ([1, 2, 3] * 3, {"ngram_size": 3, "ngram_repeats": 3}, 9),
        # a loop of 2 tokens is seen through pieces of 3
        ([1, 2] * 5, {"ngram_size": 3, "ngram_repeats": 3}, 7),
        # the piece comes back after something else
        ([1, 2, 5, 6, 1, 2], {"ngram_size": 2, "ngram_repeats": 2}, 6),
        # a third object begins
        ([3, 4, 5, 3, 4, 5, 3, 4, 5], {"max_object_keys": 2}, 8),
    ],
)
def test_worked_examples(ids: list[int], values: dict[str, int], first: int | None):
    lengths = [
        n for n in range(1, len(ids) + 1) if is_repeating(ids[:n], rules(**values), PIECES.__getitem__)
    ]
    assert (lengths[0] if lengths else None) == first


def test_an_answer_counts_as_terminated_only_when_it_ends_right_after_the_repetition():
    r = rules(max_consecutive_token_repeats=3)
    assert was_terminated([5, 5, 5, END], END, r)
    assert not was_terminated([5, 5, 5, 6, END], END, r)
    assert not was_terminated([5, 5, 5], END, r)
    assert not was_terminated([5, 5, 5, END], END, None)
    assert not was_terminated([], END, r)


def test_the_processor_forces_the_end_of_repeating_rows_and_leaves_others_alone():
    processor = RepeatTermination(
        rules(max_consecutive_token_repeats=2), num_rows=3, prompt_length=2, end_id=4, stop_ids=(4, 0)
    )
    scores = torch.arange(15.0).reshape(3, 5)
    prompt = torch.tensor([[7, 7], [7, 7], [7, 7]])  # repetition in the prompt does not count
    assert torch.equal(processor(prompt, scores.clone()), scores)
    one = torch.cat([prompt, torch.tensor([[1], [1], [4]])], dim=1)
    assert torch.equal(processor(one, scores.clone()), scores)
    two = torch.cat([one, torch.tensor([[1], [2], [0]])], dim=1)
    assert torch.equal(processor(two, scores.clone())[1:], scores[1:])
    three = torch.cat(
        [two, torch.tensor([[4], [2], [0]])], dim=1
    )  # row 0 was ended; padding of row 2 repeats
    out = processor(three, scores.clone())
    assert out[1].tolist() == [float("-inf")] * 4 + [0.0]
    assert torch.equal(out[[0, 2]], scores[[0, 2]])


def test_a_limit_of_objects_needs_the_bytes_of_tokens():
    with pytest.raises(ValueError, match="piece_of"):
        RepeatDetector(rules(max_object_keys=1))


@pytest.mark.parametrize("name", FORMS)
def test_objects_are_counted_in_every_form(real_tok, name):
    """The answer may go on behind two objects, and ends where a third begins."""
    form, pieces = form_of(name), pieces_of(real_tok)
    objects = [BoxObject("cat", "bbox_2d", (1, 2, 30, 40))] * 2 + [
        BoxObject("dog", "bbox_2d", (5, 6, 70, 80))
    ]
    ids = [real_tok.encode(form.serialize(objects[:n]), add_special_tokens=False) for n in (1, 2, 3)]
    ended = [is_repeating(answer, rules(max_object_keys=2), pieces.__getitem__) for answer in ids]
    assert ended == [False, False, True]
