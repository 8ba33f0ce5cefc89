"""Outlines and run lengths: checked before they are drawn, the same masks as pycocotools, memory bounded."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from coordexp.errors import RecordError
from coordexp.eval.coco.segmentation import (
    clip_outline,
    outline_box,
    read_outlines,
    run_lengths,
    to_mask,
)
from coordexp.geometry import polygon_area

TRIANGLE = [10.0, 20.0, 60.0, 20.0, 10.0, 90.0]
SQUARE = [5, 5, 25, 5, 25, 25, 5, 25]
WIDTH, HEIGHT = 64, 48


def points(flat: list[float]) -> list[list[float]]:
    return [flat[i : i + 2] for i in range(0, len(flat), 2)]


def decoded(mask: dict[str, Any]) -> np.ndarray:
    return coco_mask.decode(mask).astype(bool)


@pytest.mark.parametrize(
    ("segmentation", "parts"),
    [
        ([TRIANGLE], [TRIANGLE]),
        ([TRIANGLE, SQUARE], [TRIANGLE, SQUARE]),
        (TRIANGLE, [TRIANGLE]),  # flat
        ([points(TRIANGLE)], [TRIANGLE]),  # a part of points
        (points(TRIANGLE), [TRIANGLE]),  # points alone
        ([[], TRIANGLE, []], [TRIANGLE]),
        ([[str(v) for v in TRIANGLE]], [TRIANGLE]),
        (tuple(TRIANGLE), [TRIANGLE]),
        ([], []),
        ([[]], []),
    ],
)
def test_outlines_are_understood_however_they_are_nested(segmentation: Any, parts: list[list[float]]):
    assert [part.reshape(-1).tolist() for part in read_outlines(segmentation, "here")] == parts


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (
            [[10, 20, 110, 20]],
            r"^here has 2 points \(\[10, 20, 110, 20\]\): expected an outline of at least 3$",
        ),
        ([TRIANGLE, [1, 2]], r"^here, part 1 has 1 points"),
        ([[*TRIANGLE, 5]], r"^here has 7 values: expected an outline x, y, x, y, \.\.\., an even number$"),
        ([[*TRIANGLE[:-1], float("nan")]], r"^here: value 5 is nan: expected a finite pixel position$"),
        ([[*TRIANGLE[:-1], 1e300]], r"^here: value 5 is 1e\+300: expected a finite"),
        ([[*TRIANGLE[:-1], 10**400]], r"^here: value 5 is a number of some 400 digits: expected a finite"),
        ([[*TRIANGLE[:-1], None]], r"^here: value 5 is None: expected a finite"),
        ([[*TRIANGLE[:-1], "5px"]], r"^here: value 5 is '5px': expected a finite"),
        ([[*TRIANGLE[:-1], True]], r"^here: value 5 is True: expected a finite"),
        ([TRIANGLE, 5], r"^here is \[\[10.0, .*\], 5\]: expected a list of outlines"),
        ([[[10, 20, 30], [1, 2, 3], [4, 5, 6]]], r"^here is .*: expected an outline x, y"),
        ([[{"x": 1, "y": 2}] * 3], r"^here is .*: expected an outline x, y"),
        ("10 20 30", r"^here is '10 20 30': expected outlines \(a list\) or run lengths \(an object\)$"),
        (5, r"^here is 5: expected outlines"),
    ],
)
def test_a_broken_outline_is_named(segmentation: Any, message: str):
    with pytest.raises(RecordError, match=message):
        read_outlines(segmentation, "here")


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [WIDTH, HEIGHT], "counts": [0, WIDTH * HEIGHT]}, r"^here\.size is \[64, 48\]: .* \[48, 64\]"),
        ({"size": None, "counts": [0, 3072]}, r"^here\.size is None: expected the size"),
        ({"counts": [0, 3072]}, r"^here\.size is None: expected the size"),
        ({"size": [HEIGHT, WIDTH], "counts": [5, 10]}, r"^here\.counts add up to 15: expected .* = 3072$"),
        ({"size": [HEIGHT, WIDTH], "counts": [3082, -10]}, r"^here\.counts is \[3082, -10\]: expected run lengths"),
        ({"size": [HEIGHT, WIDTH], "counts": [3071.5, 0.5]}, r"^here\.counts is .*: expected run lengths"),
        ({"size": [HEIGHT, WIDTH], "counts": [10**400]}, r"^here\.counts is .*: expected run lengths"),
        ({"size": [HEIGHT, WIDTH], "counts": None}, r"^here\.counts is None: expected run lengths"),
        ({"size": [HEIGHT, WIDTH]}, r"^here\.counts is None: expected run lengths"),
        ({"size": [HEIGHT, WIDTH], "counts": "ü"}, r"^here\.counts is 'ü': expected packed run lengths"),
        ({"size": [HEIGHT, WIDTH], "counts": ""}, r"^here\.counts is '': expected packed run lengths"),
        ({"size": [HEIGHT, WIDTH], "counts": "PP"}, r"^here\.counts is 'PP': .*cut or broken"),
        ({"size": [HEIGHT, WIDTH], "counts": "PPPPPPPPPP0"}, r"^here\.counts is .*cut or broken"),
        ({"size": [HEIGHT, WIDTH], "counts": "000"}, r"^here\.counts add up to 0: expected"),
        ({"size": [HEIGHT, WIDTH], "counts": "O"}, r"^here\.counts is 'O': expected run lengths of at least 0"),
        ({}, r"^here\.size is None"),
    ],
)  # fmt: skip
def test_broken_run_lengths_are_named(segmentation: Any, message: str):
    with pytest.raises(RecordError, match=message):
        to_mask(segmentation, WIDTH, HEIGHT, "here")


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_run_lengths_are_those_that_pycocotools_packs(height: int, width: int, density: float, seed: int):
    pixels = np.random.default_rng(seed).random((height, width)) < density
    packed = coco_mask.encode(np.asfortranarray(pixels.astype(np.uint8)))
    flat = pixels.reshape(-1, order="F").astype(int)
    changes = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
    expected = np.diff(np.concatenate([[0], changes, [flat.size]]))
    found = run_lengths(packed["counts"].decode(), "here")
    assert found.tolist() == expected.tolist()
    for counts in (
        packed["counts"].decode(),
        packed["counts"],
        expected.tolist(),
        [str(v) for v in expected],
    ):
        mask = to_mask({"size": [height, width], "counts": counts}, width, height, "here")
        assert (decoded(mask) == pixels).all()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-60, 120), st.floats(-40, 90)), min_size=3, max_size=9),
    st.lists(st.tuples(st.floats(0, WIDTH), st.floats(0, HEIGHT)), min_size=3, max_size=5),
)
def test_masks_are_those_of_pycocotools_also_a_little_outside(outside: list, inside: list):
    parts = [[v for point in part for v in point] for part in (outside, inside)]
    expected = coco_mask.merge(coco_mask.frPyObjects(parts, HEIGHT, WIDTH))
    assert to_mask(parts, WIDTH, HEIGHT, "here") == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(-400, 400), st.floats(-400, 400)), min_size=3, max_size=3))
def test_a_triangle_far_outside_covers_what_it_covers_on_a_larger_canvas(corners: list):
    shift = 400
    canvas = coco_mask.frPyObjects(
        [[v + shift for point in corners for v in point]], 2 * shift + HEIGHT, 2 * shift + WIDTH
    )
    expected = coco_mask.decode(canvas)[shift : shift + HEIGHT, shift : shift + WIDTH, 0].astype(bool)
    found = decoded(to_mask([[v for point in corners for v in point]], WIDTH, HEIGHT, "here"))
    assert (found != expected).mean() < 0.03  # pixels of the border, where corners are rounded to a fifth


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(-100, 100), st.floats(-100, 100)), min_size=3, max_size=3))
def test_a_cut_triangle_lies_inside_and_keeps_its_area_inside(corners: list):
    cut = clip_outline(np.array(corners), (0, 0), (WIDTH, HEIGHT))
    assert ((cut >= 0) & (cut <= (WIDTH, HEIGHT))).all()
    whole = polygon_area([v for point in corners for v in point])
    kept = polygon_area(cut.reshape(-1)) if len(cut) >= 3 else 0.0
    beside = 0.0
    for low, high in (
        ((-200, -200), (0, 200)),
        ((WIDTH, -200), (200, 200)),
        ((0, -200), (WIDTH, 0)),
        ((0, HEIGHT), (WIDTH, 200)),
    ):
        rest = clip_outline(np.array(corners), low, high)
        beside += polygon_area(rest.reshape(-1)) if len(rest) >= 3 else 0.0
    assert kept + beside == pytest.approx(whole, abs=1e-6)


def test_what_lies_wholly_outside_covers_nothing():
    for outline in ([500, 500, 600, 500, 600, 600], [-1e8, 3, -9e7, 3, -9e7, 9]):
        assert not decoded(to_mask([outline], WIDTH, HEIGHT, "here")).any()
    assert not decoded(to_mask([[]], WIDTH, HEIGHT, "here")).any()


def test_boxes_around_segmentations():
    assert outline_box([TRIANGLE, SQUARE], 100, 100, "here") == [5, 5, 55, 85]
    assert outline_box([TRIANGLE], 0, 0, "here") == [10, 20, 50, 70]
    full = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}
    assert outline_box(full, WIDTH, HEIGHT, "here") == [0, 0, WIDTH, HEIGHT]
    with pytest.raises(RecordError, match="the image has no width and height"):
        outline_box(full, 0, 0, "here")
    with pytest.raises(RecordError, match=r"here is \[\[\]\]: expected an outline"):
        outline_box([[]], WIDTH, HEIGHT, "here")


HUNGRY = {
    "a vertex far outside": "[[10, 20, 1e9, 20, 110, 100, 10, 100]], 640, 480",
    "an outline up and down 200,000 times": "[[v for i in range(200_000) for v in (i % 640, 480 * (i % 2))]], 640, 480",
    "a picture of absurd size": "[[0, 0, 1e6, 0, 1e6, 1e6]], 1_000_000, 1_000_000",
    "run lengths of absurd size": "{'size': [10**6, 10**6], 'counts': [0, 10**12]}, 10**6, 10**6",
    "a long outline in a large picture": "[[v for i in range(9000) for v in (i, 20000 * (i % 2))]], 20_000, 20_000",
}


@pytest.mark.parametrize("kind", HUNGRY)
def test_memory_stays_below_two_gigabytes(kind: str):
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "from coordexp.errors import RecordError\n"
        "from coordexp.eval.coco.segmentation import to_mask\n"
        "try:\n"
        f"    print(len(to_mask({HUNGRY[kind]}, 'here')['counts']))\n"
        "except RecordError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.strip().isdigit() == (kind == "a vertex far outside"), done.stdout
