"""Barycentric targets against plain matrix scaling, the optimal assignment, and hand-worked polygons."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from coordexp.errors import ContractError, RecordError
from coordexp.matching import barycentric_targets
from coordexp.matching.sinkhorn import point_cost, sinkhorn_plan

SQUARE = (0, 0, 100, 0, 100, 100, 0, 100)

points = st.lists(st.tuples(st.integers(0, 999), st.integers(0, 999)), min_size=3, max_size=7)


def matrix_scaling(cost: np.ndarray, epsilon: float, iters: int) -> np.ndarray:
    """The iteration as it is usually written: scale the rows, then the columns, of exp(-C / epsilon)."""
    kernel = np.exp(-cost / epsilon)
    n, m = cost.shape
    v = np.ones(m)
    for _ in range(iters):
        u = (1 / n) / (kernel @ v)
        v = (1 / m) / (kernel.T @ u)
    return u[:, None] * kernel * v[None, :]


@settings(max_examples=40, deadline=None)
@given(points, points, st.sampled_from(["l1", "l2"]), st.sampled_from([100.0, 300.0]), st.integers(1, 50))
def test_equals_plain_matrix_scaling_where_that_does_not_underflow(pred, gt, ot_cost, epsilon, iters):
    cost = point_cost(np.array(pred, float), np.array(gt, float), ot_cost)
    np.testing.assert_allclose(
        sinkhorn_plan(cost, epsilon, iters), matrix_scaling(cost, epsilon, iters), rtol=1e-9, atol=1e-15
    )


@settings(max_examples=40, deadline=None)
@given(points, points, st.sampled_from([0.01, 1.0, 10.0]))
def test_targets_stay_inside_the_box_of_the_ground_truth_for_any_epsilon(pred, gt, epsilon):
    targets = barycentric_targets(np.ravel(pred), np.ravel(gt), ot_epsilon=epsilon)
    assert targets.shape == (len(pred), 2)
    assert (targets >= np.min(gt, axis=0) - 1e-6).all()
    assert (targets <= np.max(gt, axis=0) + 1e-6).all()


def test_a_small_epsilon_gives_the_optimal_assignment_of_equal_vertex_counts():
    rng = np.random.default_rng(3)
    pred, gt = rng.uniform(0, 999, (6, 2)), rng.uniform(0, 999, (6, 2))
    _, partner = linear_sum_assignment(point_cost(pred, gt, "l2"))
    targets = barycentric_targets(pred.ravel(), gt.ravel(), ot_epsilon=1.0, ot_iters=3000)
    np.testing.assert_allclose(targets, gt[partner], atol=0.5)


def test_a_shifted_square_goes_to_its_own_corners_whatever_the_order_of_vertices():
    shifted = tuple(value + 5 for value in SQUARE)
    rolled = SQUARE[2:] + SQUARE[:2]
    targets = barycentric_targets(shifted, rolled, ot_epsilon=2.0)
    np.testing.assert_allclose(targets.ravel(), SQUARE, atol=1e-6)


def test_a_large_epsilon_sends_every_vertex_to_the_mean_of_the_ground_truth():
    targets = barycentric_targets((3, 1, 90, 7, 40, 80), SQUARE, ot_epsilon=1e9)
    np.testing.assert_allclose(targets, np.full((3, 2), 50.0), atol=1e-4)


def test_converged_marginals_are_uniform():
    cost = point_cost(np.array([[0.0, 0], [30, 4], [9, 50]]), np.array([[1.0, 1], [20, 20]]), "l1")
    plan = sinkhorn_plan(cost, epsilon=5.0, iters=500)
    np.testing.assert_allclose(plan.sum(axis=0), [1 / 2] * 2, rtol=1e-12)
    np.testing.assert_allclose(plan.sum(axis=1), [1 / 3] * 3, rtol=1e-9)


def test_costs_are_city_block_and_euclidean():
    origin, corner = np.zeros((1, 2)), np.array([[3.0, 4.0]])
    assert point_cost(origin, corner, "l1").item() == 7.0
    assert point_cost(origin, corner, "l2").item() == 5.0


@pytest.mark.parametrize("option", [{"ot_cost": "l3"}, {"ot_epsilon": 0.0}, {"ot_iters": 0}])
def test_an_option_out_of_range_is_named(option):
    with pytest.raises(ContractError, match=next(iter(option))):
        barycentric_targets(SQUARE, SQUARE, **option)


def test_a_polygon_of_two_points_is_refused():
    with pytest.raises(RecordError, match="at least 6 values"):
        barycentric_targets((0, 0, 5, 5), SQUARE)
