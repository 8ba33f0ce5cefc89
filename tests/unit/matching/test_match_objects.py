"""The assignment: optimal against brute force, gated, independent of dtype and of the order of objects."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.codec.schema import BoxObject
from coordexp.errors import ContractError
from coordexp.matching import match_objects
from coordexp.matching.cost import candidate_pairs, outlines_of, pairwise_mask_iou


def box(*bins: int) -> BoxObject:
    return BoxObject("thing", "bbox_2d", bins)


def poly(*bins: int) -> BoxObject:
    return BoxObject("thing", "poly", bins)


# Coordinates on a coarse grid in one corner: overlaps, exact ties and duplicates are common.
grid = st.integers(0, 6).map(lambda step: 40 * step)
coarse_boxes = st.tuples(grid, grid, st.integers(1, 4), st.integers(1, 4)).map(
    lambda c: box(c[0], c[1], c[0] + 40 * c[2], c[1] + 40 * c[3])
)
coarse_polygons = st.tuples(grid, grid, st.integers(1, 4), st.integers(1, 4)).map(
    lambda c: poly(c[0], c[1], c[0] + 40 * c[2], c[1], c[0] + 40 * c[2], c[1] + 40 * c[3])
)
coarse_shapes = st.one_of(coarse_boxes, coarse_polygons)
up_to_six = st.lists(coarse_shapes, max_size=6)


def all_assignments(feasible: np.ndarray):
    """Every set of disjoint feasible pairs, as lists of (pred, gt)."""

    def extend(pred: int, used: frozenset[int]):
        if pred == feasible.shape[0]:
            yield []
            return
        yield from extend(pred + 1, used)
        for gt in range(feasible.shape[1]):
            if feasible[pred, gt] and gt not in used:
                for rest in extend(pred + 1, used | {gt}):
                    yield [(pred, gt), *rest]

    yield from extend(0, frozenset())


def total_cost(pairs, iou, fp_cost, fn_cost):
    num_preds, num_gts = iou.shape
    matched = sum(1.0 - iou[pair] for pair in pairs)
    return matched + fp_cost * (num_preds - len(pairs)) + fn_cost * (num_gts - len(pairs))


@settings(max_examples=200, deadline=None)
@given(
    preds=up_to_six,
    gts=up_to_six,
    gate=st.sampled_from([0.0, 0.1, 0.3, 0.6]),
    top_k=st.integers(1, 6),
    costs=st.sampled_from([(1.0, 1.0), (0.25, 0.25), (0.0, 0.5), (2.0, 0.1)]),
)
def test_equals_brute_force_over_all_assignments(preds, gts, gate, top_k, costs):
    fp_cost, fn_cost = costs
    pred_outlines, gt_outlines = outlines_of(preds, "preds"), outlines_of(gts, "gts")
    candidates = candidate_pairs(pred_outlines.boxes_xyxy, gt_outlines.boxes_xyxy, top_k)
    iou = pairwise_mask_iou(pred_outlines, gt_outlines, 64)
    feasible = candidates & (iou >= gate)

    match = match_objects(preds, gts, top_k=top_k, gate=gate, resolution=64, fp_cost=fp_cost, fn_cost=fn_cost)

    assignments = list(all_assignments(feasible))
    costs_of_all = np.array([total_cost(pairs, iou, fp_cost, fn_cost) for pairs in assignments])
    assert all(feasible[pair] for pair in match.matched)
    assert total_cost(match.matched, iou, fp_cost, fn_cost) == pytest.approx(costs_of_all.min(), abs=1e-9)
    nearly_best = np.flatnonzero(costs_of_all < costs_of_all.min() + 1e-9)
    if len(nearly_best) == 1:
        assert match.matched == assignments[nearly_best[0]]
    assert match.num_candidates == len(preds) * min(top_k, len(gts))
    assert match.gating_rejections == int((candidates & (iou < gate)).sum())


@settings(max_examples=200, deadline=None)
@given(preds=up_to_six, gts=up_to_six)
def test_every_object_appears_exactly_once(preds, gts):
    match = match_objects(preds, gts)
    assert sorted([p for p, _ in match.matched] + match.unmatched_pred) == list(range(len(preds)))
    assert sorted([g for _, g in match.matched] + match.unmatched_gt) == list(range(len(gts)))
    assert match.matched == sorted(match.matched)
    assert match.maskiou_sum == pytest.approx(sum(match.maskious))
    assert all(iou >= 0.3 for iou in match.maskious)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), gts=up_to_six)
def test_permuting_predictions_permutes_the_result_even_under_ties(data, gts):
    preds = data.draw(st.lists(coarse_shapes, max_size=6, unique_by=lambda shape: (shape.kind, shape.bins)))
    order = data.draw(st.permutations(range(len(preds))))
    straight = match_objects(preds, gts, resolution=1000)
    shuffled = match_objects([preds[i] for i in order], gts, resolution=1000)
    assert sorted((order[p], g) for p, g in shuffled.matched) == straight.matched
    assert sorted(order[p] for p in shuffled.unmatched_pred) == straight.unmatched_pred
    assert shuffled.unmatched_gt == straight.unmatched_gt
    assert shuffled.gating_rejections == straight.gating_rejections
    assert shuffled.maskiou_sum == straight.maskiou_sum


def test_equally_good_predictions_are_told_apart_by_geometry_not_by_position():
    left, right, gt = box(0, 0, 100, 100), box(40, 0, 140, 100), box(20, 0, 120, 100)
    straight = match_objects([left, right], [gt], resolution=1000)
    shuffled = match_objects([right, left], [gt], resolution=1000)
    assert straight.maskious == shuffled.maskious == [80 / 120]
    assert straight.matched[0][0] == 1 - shuffled.matched[0][0]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), preds=up_to_six)
def test_permuting_ground_truths_permutes_the_result_when_all_are_candidates(data, preds):
    gts = data.draw(st.lists(coarse_shapes, max_size=6, unique_by=lambda shape: (shape.kind, shape.bins)))
    order = data.draw(st.permutations(range(len(gts))))
    straight = match_objects(preds, gts, top_k=6, resolution=1000)
    shuffled = match_objects(preds, [gts[j] for j in order], top_k=6, resolution=1000)
    assert sorted((p, order[g]) for p, g in shuffled.matched) == straight.matched
    assert shuffled.maskiou_sum == straight.maskiou_sum


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int64, np.float32, np.float64, list, tuple])
def test_the_result_does_not_depend_on_the_dtype_of_the_bins(dtype):
    rng = np.random.default_rng(7)
    corners = rng.integers(0, 700, (12, 2))
    gts = [box(*map(int, (*corner, *(corner + rng.integers(20, 299, 2))))) for corner in corners]
    preds = [box(*(min(999, value + 17) for value in gt.bins)) for gt in gts]
    preds.append(poly(10, 10, 400, 30, 250, 380))

    def converted(shape: BoxObject) -> SimpleNamespace:
        bins = dtype(shape.bins) if dtype in (list, tuple) else np.array(shape.bins, dtype=dtype)
        return SimpleNamespace(kind=shape.kind, bins=bins)

    expected = match_objects(preds, gts)
    assert len(expected.matched) > 3
    assert match_objects([converted(p) for p in preds], [converted(g) for g in gts]) == expected


def test_an_exchange_of_partners_beats_the_greedy_choice():
    # One bin is one pixel. IoU: a-A 9/11, a-B 8/12, b-A 7/13, b-B 4/16. Greedy takes a-A and loses b.
    a, b = box(100, 0, 200, 10), box(60, 0, 160, 10)
    gt_a, gt_b = box(90, 0, 190, 10), box(120, 0, 220, 10)
    match = match_objects([a, b], [gt_a, gt_b], resolution=1000, gate=0.5)
    assert match.matched == [(0, 1), (1, 0)]
    assert match.maskious == [80 / 120, 70 / 130]
    assert match.maskiou_sum == 80 / 120 + 70 / 130
    assert (match.num_candidates, match.gating_rejections) == (4, 1)


def test_a_pair_at_the_gate_is_feasible_and_one_below_is_rejected():
    pred, gt = box(0, 0, 100, 10), box(0, 0, 50, 10)
    at_gate = match_objects([pred], [gt], resolution=1000, gate=0.5)
    assert (at_gate.matched, at_gate.maskiou_sum, at_gate.gating_rejections) == ([(0, 0)], 0.5, 0)
    below = match_objects([pred], [gt], resolution=1000, gate=0.51)
    assert (below.matched, below.unmatched_pred, below.unmatched_gt) == ([], [0], [0])
    assert below.gating_rejections == 1


def test_a_pair_dearer_than_leaving_both_alone_is_not_matched():
    pred, gt = box(0, 0, 100, 10), box(0, 0, 50, 10)
    match = match_objects([pred], [gt], resolution=1000, fp_cost=0.2, fn_cost=0.2)
    assert (match.matched, match.gating_rejections) == ([], 0)


def test_candidates_are_the_best_overlaps_and_only_they_count_as_rejections():
    pred = box(0, 0, 100, 100)
    gts = [box(0, 0, 100, 10 * height) for height in (2, 10, 6, 1)]  # box IoU 0.2, 1.0, 0.6, 0.1
    match = match_objects([pred], gts, top_k=2, gate=0.7)
    assert (match.matched, match.num_candidates, match.gating_rejections) == ([(0, 1)], 2, 1)
    outlines = outlines_of([pred], "preds"), outlines_of(gts, "gts")
    assert candidate_pairs(*(o.boxes_xyxy for o in outlines), 2).tolist() == [[False, True, True, False]]


def test_equal_overlaps_go_to_the_lower_index():
    pred, gts = box(0, 0, 100, 100), [box(0, 0, 50, 100), box(50, 0, 100, 100), box(0, 0, 100, 50)]
    outlines = outlines_of([pred], "preds"), outlines_of(gts, "gts")
    assert candidate_pairs(*(o.boxes_xyxy for o in outlines), 2).tolist() == [[True, True, False]]


def test_without_overlap_the_nearest_centres_are_candidates():
    pred = box(0, 0, 10, 10)
    gts = [box(500, 500, 510, 510), box(30, 0, 40, 10), box(20, 300, 30, 310)]
    outlines = outlines_of([pred], "preds"), outlines_of(gts, "gts")
    assert candidate_pairs(*(o.boxes_xyxy for o in outlines), 2).tolist() == [[False, True, True]]
    match = match_objects([pred], gts, top_k=2)
    assert (match.matched, match.num_candidates, match.gating_rejections) == ([], 2, 2)


def test_of_twin_predictions_the_first_is_matched_and_of_twin_ground_truths_the_first():
    twin = box(10, 10, 90, 90)
    match = match_objects([box(500, 500, 600, 600), twin, twin], [twin])
    assert (match.matched, match.unmatched_pred) == ([(1, 0)], [0, 2])
    match = match_objects([twin], [twin, twin, twin])
    assert (match.matched, match.unmatched_gt) == ([(0, 0)], [1, 2])
    match = match_objects([twin, twin], [twin, twin])
    assert match.matched == [(0, 0), (1, 1)]


def test_an_earlier_twin_takes_the_match_that_the_solver_gave_to_a_later_one():
    twin = box(80, 0, 120, 120)
    preds = [box(120, 120, 200, 240), twin, box(40, 40, 120, 160), twin]
    gts = [box(40, 80, 80, 120), box(40, 40, 160, 120), box(80, 120, 160, 160)]
    match = match_objects(preds, gts, resolution=1000, gate=0.1)
    assert match.matched == [(0, 2), (1, 1), (2, 0)]


@settings(max_examples=200, deadline=None)
@given(kinds=st.lists(coarse_shapes, min_size=1, max_size=3), data=st.data())
def test_matched_twins_come_before_unmatched_ones(kinds, data):
    preds, gts = (data.draw(st.lists(st.sampled_from(kinds), max_size=6)) for _ in range(2))
    match = match_objects(preds, gts, top_k=2, gate=0.1)
    for objects, matched in ((preds, {p for p, _ in match.matched}), (gts, {g for _, g in match.matched})):
        for shape in objects:
            twins = [index for index, other in enumerate(objects) if other == shape]
            assert [t for t in twins if t in matched] == twins[: sum(t in matched for t in twins)]


def test_a_polygon_among_the_objects_changes_nothing_for_the_boxes_beside_it():
    preds = [box(0, 0, 100, 100), box(200, 200, 300, 330)]
    gts = [box(210, 200, 300, 330), box(0, 10, 100, 100)]
    alone = match_objects(preds, gts)
    triangle = poly(700, 700, 900, 700, 800, 900)
    beside = match_objects([*preds, triangle], [*gts, triangle])
    assert beside.matched == [*alone.matched, (2, 2)]
    assert beside.maskious == [*alone.maskious, 1.0]


def test_a_polygon_prediction_can_match_a_box():
    diamond, square = poly(500, 0, 999, 500, 500, 999, 0, 500), box(0, 0, 999, 999)
    match = match_objects([diamond], [square])
    assert match.matched == [(0, 0)]
    assert match.maskiou_sum == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("num_preds", "num_gts"), [(0, 0), (0, 2), (2, 0)])
def test_an_empty_side_leaves_the_other_unmatched(num_preds, num_gts):
    shape = box(0, 0, 10, 10)
    match = match_objects([shape] * num_preds, [shape] * num_gts)
    assert (match.matched, match.maskiou_sum, match.num_candidates) == ([], 0.0, 0)
    assert (match.unmatched_pred, match.unmatched_gt) == (list(range(num_preds)), list(range(num_gts)))


@pytest.mark.parametrize(
    "option", [{"top_k": 0}, {"gate": 1.5}, {"gate": float("nan")}, {"resolution": 1}, {"fn_cost": -0.1}]
)
def test_an_option_out_of_range_is_named(option):
    with pytest.raises(ContractError, match=f"^{next(iter(option))} is "):
        match_objects([], [], **option)
