"""Matching-based precision, recall and F1: hand-worked images, brute-force matching, and the empty sets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.codec.schema import BoxObject
from coordexp.errors import ConfigError, ContractError
from coordexp.eval.detection import (
    COCO_THRESHOLDS,
    Counts,
    DetectionMetrics,
    MatchMetrics,
    match_at_threshold,
)
from coordexp.matching import match_objects

BOX = (0, 0, 100, 10)
FAR = (500, 500, 600, 600)


def overlapping(iou: float) -> tuple[float, float, float, float]:
    """A box with the given IoU with BOX (same height, narrower)."""
    return (0, 0, 100 * iou, 10)


def one_image(preds, gts, **options) -> DetectionMetrics:
    """Metrics of one image; preds and gts are lists of (box, desc)."""
    metrics = DetectionMetrics(**options)
    add_image(metrics, preds, gts)
    return metrics


def add_image(metrics: DetectionMetrics, preds, gts) -> None:
    metrics.update([b for b, _ in preds], [d for _, d in preds], [b for b, _ in gts], [d for _, d in gts])


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 5).flatmap(
        lambda p: st.integers(0, 5).flatmap(
            lambda g: st.lists(
                st.sampled_from([0.0, 0.3, 0.5, 0.6, 0.75, 0.9, 1.0]), min_size=p * g, max_size=p * g
            ).map(lambda values: np.array(values).reshape(p, g))
        )
    ),
    st.sampled_from([0.3, 0.5, 0.75]),
)
def test_most_pairs_then_most_overlap_as_brute_force_finds(iou_PG, threshold):
    num_preds, num_gts = iou_PG.shape
    best = (0, 0.0)
    for partners in itertools.product([None, *range(num_gts)], repeat=num_preds):
        pairs = [(p, g) for p, g in enumerate(partners) if g is not None]
        distinct = len({g for _, g in pairs}) == len(pairs)
        if distinct and all(iou_PG[pair] >= threshold for pair in pairs):
            best = max(best, (len(pairs), round(sum(iou_PG[pair] for pair in pairs), 9)))
    pairs = match_at_threshold(iou_PG, threshold)
    assert all(iou_PG[pair] >= threshold for pair in pairs)
    assert len({p for p, _ in pairs}) == len({g for _, g in pairs}) == len(pairs)
    assert (len(pairs), round(sum(iou_PG[pair] for pair in pairs), 9)) == best


def test_two_pairs_above_the_threshold_beat_one_perfect_pair():
    assert match_at_threshold(np.array([[1.0, 0.4], [0.4, 0.0]]), 0.3) == [(0, 1), (1, 0)]


def test_counts_and_scores_by_hand():
    preds = [(overlapping(0.8), "cat"), (FAR, "cat"), (FAR, "dog")]
    gts = [(BOX, "cat"), (BOX, "bird"), (FAR, "dog"), ((0, 50, 9, 60), "dog")]
    summary = one_image(preds, gts).compute()
    at_50, at_85 = summary.at(0.5), summary.at(0.85)
    assert at_50.counts == Counts(tp=2, fp=1, fn=2)
    assert at_50.micro == pytest.approx((2 / 3, 2 / 4, 4 / 7))
    assert at_50.per_class == {"bird": Counts(0, 0, 1), "cat": Counts(1, 1, 0), "dog": Counts(1, 0, 1)}
    assert at_50.macro_classes == pytest.approx(
        ((1 + 0.5 + 1) / 3, (0 + 1 + 0.5) / 3, (0 + 2 / 3 + 2 / 3) / 3)
    )
    assert at_50.matched_iou_mean == pytest.approx((0.8 + 1.0) / 2)
    assert at_85.counts == Counts(tp=1, fp=2, fn=3)
    assert summary.f1_at(0.5) == pytest.approx(4 / 7)
    # IoU 0.50 ... 0.80 find two, 0.85 ... 0.95 one.
    assert summary.mean_f1 == pytest.approx((7 * 4 / 7 + 3 * 2 / 7) / 10)


def test_default_thresholds_are_those_of_coco_and_the_bound_itself_counts():
    assert COCO_THRESHOLDS == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
    assert (
        one_image([(overlapping(0.5), "cat")], [(BOX, "cat")], thresholds=[0.5]).compute().f1_at(0.5) == 1.0
    )
    assert (
        one_image([(overlapping(0.49), "cat")], [(BOX, "cat")], thresholds=[0.5]).compute().f1_at(0.5) == 0.0
    )


@pytest.mark.parametrize(
    ("preds", "gts", "precision", "recall", "f1"),
    [
        ([], [], 1.0, 1.0, 1.0),
        ([], [(BOX, "cat")], 1.0, 0.0, 0.0),
        ([(BOX, "cat")], [], 0.0, 1.0, 0.0),
        ([(BOX, "cat")], [(BOX, "cat")], 1.0, 1.0, 1.0),
    ],
)
def test_empty_sets(preds, gts, precision, recall, f1):
    at_50 = one_image(preds, gts).compute().at(0.5)
    assert at_50.micro == at_50.macro_images == at_50.macro_classes == (precision, recall, f1)


def test_macro_over_images_is_the_mean_of_the_scores_of_each_image():
    metrics = one_image([(BOX, "cat"), (FAR, "cat"), (FAR, "dog")], [(BOX, "cat")])  # 1/3, 1, 1/2
    add_image(metrics, [], [])  # 1, 1, 1
    add_image(metrics, [], [(BOX, "cat")])  # 1, 0, 0
    at_50 = metrics.compute().at(0.5)
    assert at_50.macro_images == pytest.approx(((1 / 3 + 1 + 1) / 3, 2 / 3, (1 / 2 + 1 + 0) / 3))
    assert at_50.micro == pytest.approx((1 / 3, 1 / 2, 2 / 5))
    assert at_50.macro_classes == (1 / 2, 1 / 2, 1 / 2)  # of the cats alone: no dog is annotated
    assert metrics.compute().num_images == 3


def test_descs_decide_only_when_class_aware():
    preds, gts = [(BOX, "kitten")], [(BOX, "cat")]
    assert one_image(preds, gts).compute().at(0.5).counts == Counts(0, 1, 1)
    agnostic = one_image(preds, gts, class_aware=False).compute().at(0.5)
    assert agnostic.counts == Counts(1, 0, 0)
    assert agnostic.micro == agnostic.macro_classes == (1.0, 1.0, 1.0)


def test_annotated_scope_leaves_out_predictions_of_descs_the_image_does_not_hold():
    preds, gts = [(BOX, "cat"), (FAR, "cat"), (FAR, "unicorn")], [(BOX, "cat")]
    assert one_image(preds, gts).compute().at(0.5).counts == Counts(1, 2, 0)
    assert one_image(preds, gts, scope="annotated").compute().at(0.5).counts == Counts(1, 1, 0)


def test_the_same_boxes_in_bins_and_in_pixels_give_the_same_counts():
    scale = np.array([6.4, 4.8, 6.4, 4.8])
    preds, gts = np.array([overlapping(0.7), FAR]), np.array([BOX, FAR])
    in_bins, in_pixels = DetectionMetrics(), DetectionMetrics()
    in_bins.update(preds, ["a", "b"], gts, ["a", "b"])
    in_pixels.update(preds * scale, ["a", "b"], gts * scale, ["a", "b"])
    assert [s.counts for s in in_bins.compute().by_threshold] == [
        s.counts for s in in_pixels.compute().by_threshold
    ]


def test_merging_parts_equals_one_pass_and_reset_forgets():
    rng = np.random.default_rng(1)
    images = []
    for _ in range(20):
        corners = rng.uniform(0, 80, (4, 2))
        gts = [((*c, *(c + 20)), str(rng.choice(["a", "b"]))) for c in corners]
        preds = [(np.array(box) + rng.normal(0, 2, 4), desc) for box, desc in gts if rng.random() < 0.8]
        images.append((preds, gts))
    whole, first, second = DetectionMetrics(), DetectionMetrics(), DetectionMetrics()
    for index, (preds, gts) in enumerate(images):
        add_image(whole, preds, gts)
        add_image(first if index < 7 else second, preds, gts)
    first.merge(second)
    for merged, single in zip(first.compute().by_threshold, whole.compute().by_threshold, strict=True):
        assert (merged.counts, merged.per_class, merged.micro) == (
            single.counts,
            single.per_class,
            single.micro,
        )
        assert merged.macro_images == pytest.approx(single.macro_images)
        assert merged.matched_iou_mean == pytest.approx(single.matched_iou_mean)
    whole.reset()
    add_image(whole, [(BOX, "cat")], [(BOX, "cat")])
    assert (whole.compute().num_images, whole.compute().mean_f1) == (1, 1.0)
    with pytest.raises(ContractError, match="cannot merge"):
        whole.merge(DetectionMetrics(class_aware=False))


def test_misuse_is_named():
    with pytest.raises(ContractError, match="no image was added"):
        DetectionMetrics().compute()
    with pytest.raises(ContractError, match=r"IoU threshold 0\.33 was not evaluated"):
        one_image([], []).compute().at(0.33)
    with pytest.raises(ContractError, match=r"pred boxes have shape \(1, 4\) for 2 descs"):
        DetectionMetrics().update([BOX], ["cat", "dog"], [], [])
    with pytest.raises(ConfigError, match="thresholds are"):
        DetectionMetrics(thresholds=[0.0])
    with pytest.raises(ConfigError, match="scope is 'some'"):
        DetectionMetrics(scope="some")


def test_match_metrics_sum_over_images():
    def box(*bins: int) -> BoxObject:
        return BoxObject("cat", "bbox_2d", bins)

    metrics = MatchMetrics()
    assert (metrics.matched_maskiou_mean, metrics.gating_rejection_rate, metrics.sample_any_match_rate) == (
        None,
    ) * 3
    metrics.update(match_objects([box(0, 0, 100, 10), box(*FAR)], [box(0, 0, 80, 10)], resolution=1000))
    metrics.update(match_objects([box(*BOX)], [box(*BOX), box(*FAR)], resolution=1000))
    metrics.update(match_objects([], [box(*BOX)]))
    assert metrics.counts == Counts(tp=2, fp=1, fn=2)
    assert metrics.compute() == pytest.approx((2 / 3, 1 / 2, 4 / 7))
    assert metrics.matched_maskiou_mean == pytest.approx((0.8 + 1.0) / 2)
    assert metrics.gating_rejection_rate == 2 / 4
    assert metrics.sample_any_match_rate == pytest.approx(2 / 3)
    metrics.reset()
    assert (metrics.num_images, metrics.counts, metrics.maskiou_sum) == (0, Counts(0, 0, 0), 0.0)


def test_a_crowd_region_is_no_miss_and_excuses_only_unmatched_predictions_inside_it():
    crowd, inside, half_inside = (0, 0, 100, 100), (10, 10, 20, 20), (90, 0, 110, 10)
    metrics = DetectionMetrics([0.5, 0.75])
    preds = [inside, half_inside, (300, 300, 320, 320)]
    matches = metrics.update(preds, ["cat"] * 3, [crowd, inside], ["cat", "cat"], [True, False])
    # inside: found (it is also a regular object); half_inside: excused at 0.5, not at 0.75; the third never.
    assert matches.pairs == [[(0, 1)], [(0, 1)]]
    assert [at.counts for at in metrics.compute().by_threshold] == [Counts(1, 1, 0), Counts(1, 2, 0)]


def test_a_crowd_excuses_predictions_of_its_own_class_only():
    metrics = DetectionMetrics([0.5])
    metrics.update([(10, 10, 20, 20)], ["dog"], [(0, 0, 100, 100)], ["cat"], [True])
    assert metrics.compute().at(0.5).counts == Counts(0, 1, 0)
    agnostic = DetectionMetrics([0.5], class_aware=False)
    agnostic.update([(10, 10, 20, 20)], ["dog"], [(0, 0, 100, 100)], ["cat"], [True])
    assert agnostic.compute().at(0.5).counts == Counts(0, 0, 0)


def test_pairs_are_indices_into_the_lists_given():
    metrics = DetectionMetrics([0.5], scope="annotated")
    preds = [((0, 0, 9, 9), "unicorn"), (FAR, "dog"), (BOX, "cat")]
    matches = metrics.update(*zip(*preds, strict=True), [BOX, FAR], ["cat", "dog"])
    assert matches.pairs == [[(1, 1), (2, 0)]]
    assert matches.counts.tolist() == [[2, 0, 0]]
