"""Matching-based precision, recall and F1: hand-worked images, brute-force matching, and the empty sets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.images import image_result

from coordexp.errors import ConfigError, ContractError
from coordexp.eval import box_matching
from coordexp.eval.box_matching import BoxSet, match_at_threshold
from coordexp.eval.detection import (
    COCO_THRESHOLDS,
    Counts,
    DetectionSummary,
    ImageMatch,
    match_boxes,
    scores_of,
)
from coordexp.eval.predictions.image_result import ImageResult, Objects
from coordexp.geometry import box_areas, pairwise_iou

BOX = (0, 0, 100, 10)
FAR = (500, 500, 600, 600)


def overlapping(iou: float) -> tuple[float, float, float, float]:
    """A box with the given IoU with BOX (same height, narrower)."""
    return (0, 0, 100 * iou, 10)


def image_of(preds, gts, crowd=None, size=(1000, 1000)) -> ImageResult:
    """An image with these (box, desc) lists."""
    pred, gt = ([(desc, box) for box, desc in side] for side in (preds, gts))
    return image_result(0, *size, gt, pred, crowd=crowd)


def summary_of(*images: ImageResult, **options) -> DetectionSummary:
    return match_boxes(BoxSet.of(images), **options)


def one_image(preds, gts, **options) -> DetectionSummary:
    """Results of one image; preds and gts are lists of (box, desc)."""
    return summary_of(image_of(preds, gts), **options)


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
    summary = one_image(preds, gts)
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
    assert summary.f1_50_95 == pytest.approx((7 * 4 / 7 + 3 * 2 / 7) / 10)


def test_default_thresholds_are_those_of_coco_and_the_bound_itself_counts():
    assert COCO_THRESHOLDS == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
    assert one_image([(overlapping(0.5), "cat")], [(BOX, "cat")], thresholds=[0.5]).f1_at(0.5) == 1.0
    assert one_image([(overlapping(0.49), "cat")], [(BOX, "cat")], thresholds=[0.5]).f1_at(0.5) == 0.0


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
    at_50 = one_image(preds, gts).at(0.5)
    assert at_50.micro == at_50.macro_images == at_50.macro_classes == (precision, recall, f1)


def test_macro_over_images_is_the_mean_of_the_scores_of_each_image():
    summary = summary_of(
        image_of([(BOX, "cat"), (FAR, "cat"), (FAR, "dog")], [(BOX, "cat")]),  # 1/3, 1, 1/2
        image_of([], []),  # 1, 1, 1
        image_of([], [(BOX, "cat")]),  # 1, 0, 0
    )
    at_50 = summary.at(0.5)
    assert at_50.macro_images == pytest.approx(((1 / 3 + 1 + 1) / 3, 2 / 3, (1 / 2 + 1 + 0) / 3))
    assert at_50.micro == pytest.approx((1 / 3, 1 / 2, 2 / 5))
    assert at_50.macro_classes == (1 / 2, 1 / 2, 1 / 2)  # of the cats alone: no dog is annotated
    assert summary.num_images == 3


def test_descs_decide_only_when_class_aware():
    preds, gts = [(BOX, "kitten")], [(BOX, "cat")]
    assert one_image(preds, gts).at(0.5).counts == Counts(0, 1, 1)
    agnostic = one_image(preds, gts, class_aware=False).at(0.5)
    assert agnostic.counts == Counts(1, 0, 0)
    assert agnostic.micro == agnostic.macro_classes == (1.0, 1.0, 1.0)


def test_annotated_scope_leaves_out_predictions_of_descs_the_image_does_not_hold():
    preds, gts = [(BOX, "cat"), (FAR, "cat"), (FAR, "unicorn")], [(BOX, "cat")]
    assert one_image(preds, gts).at(0.5).counts == Counts(1, 2, 0)
    assert one_image(preds, gts, scope="annotated").at(0.5).counts == Counts(1, 1, 0)


def test_the_same_boxes_in_bins_and_in_pixels_give_the_same_counts():
    scale = np.array([6.4, 4.8, 6.4, 4.8])
    preds, gts = [overlapping(0.7), FAR], [BOX, FAR]
    in_bins, in_pixels = (
        one_image(
            [(tuple(np.array(box) * factor), desc) for box, desc in zip(preds, "ab", strict=True)],
            [(tuple(np.array(box) * factor), desc) for box, desc in zip(gts, "ab", strict=True)],
        )
        for factor in (1.0, scale)
    )
    assert [s.counts for s in in_bins.by_threshold] == [s.counts for s in in_pixels.by_threshold]


def test_misuse_is_named():
    with pytest.raises(ContractError, match="there is no image"):
        BoxSet.of([])
    with pytest.raises(ContractError, match=r"IoU threshold 0\.33 was not evaluated"):
        one_image([], []).at(0.33)
    with pytest.raises(ContractError, match=r"are \[2, 1, 1, 2, 2\]: expected as many"):
        Objects.of(["cat", "dog"], [BOX])
    with pytest.raises(ConfigError, match="thresholds are"):
        one_image([], [], thresholds=[0.0])
    with pytest.raises(ConfigError, match="scope is 'some'"):
        one_image([], [], scope="some")


def test_scores_from_counts_of_any_shape():
    precision, recall, f1 = scores_of([2, 0, 0, 0], [1, 0, 3, 0], [2, 0, 0, 4])
    assert precision.tolist() == pytest.approx([2 / 3, 1, 0, 1])
    assert recall.tolist() == pytest.approx([1 / 2, 1, 1, 0])
    assert f1.tolist() == pytest.approx([4 / 7, 1, 0, 0])
    assert Counts(2, 1, 2).scores == pytest.approx((2 / 3, 1 / 2, 4 / 7))
    assert Counts(2, 1, 2).ratios == ((2, 3), (2, 4), (4, 7))


def test_a_crowd_region_is_no_miss_and_excuses_only_unmatched_predictions_inside_it():
    crowd, inside, half_inside = (0, 0, 100, 100), (10, 10, 20, 20), (90, 0, 110, 10)
    preds = [(box, "cat") for box in (inside, half_inside, (300, 300, 320, 320))]
    image = image_of(preds, [(crowd, "cat"), (inside, "cat")], crowd=[True, False])
    summary = summary_of(image, thresholds=[0.5, 0.75])
    # inside: found (it is also a regular object); half_inside: excused at 0.5, not at 0.75; the third never.
    assert summary.matches(0.5) == [ImageMatch(((0, 1, 1.0),), frozenset({1}), Counts(1, 1, 0))]
    assert summary.matches(0.75) == [ImageMatch(((0, 1, 1.0),), frozenset(), Counts(1, 2, 0))]
    assert [at.counts for at in summary.by_threshold] == [Counts(1, 1, 0), Counts(1, 2, 0)]


def test_a_crowd_excuses_predictions_of_its_own_class_only():
    image = image_of([((10, 10, 20, 20), "dog")], [((0, 0, 100, 100), "cat")], crowd=[True])
    assert summary_of(image).at(0.5).counts == Counts(0, 1, 0)
    assert summary_of(image, class_aware=False).at(0.5).counts == Counts(0, 0, 0)


def test_pairs_are_indices_into_the_objects_of_the_image():
    preds = [((0, 0, 9, 9), "unicorn"), (FAR, "dog"), (BOX, "cat")]
    images = image_of([(BOX, "cat")], []), image_of(preds, [(BOX, "cat"), (FAR, "dog")])
    empty, found = summary_of(*images, scope="annotated").matches(0.5)
    assert empty == ImageMatch((), frozenset(), Counts(0, 0, 0))
    assert [pair[:2] for pair in found.pairs] == [(1, 1), (2, 0)]
    assert found.counts == Counts(2, 0, 0)
    assert found.mean_iou == 1.0


def crowded_images(seed: int, num_images: int = 12) -> list[ImageResult]:
    """Many overlapping boxes of two classes, some of them crowd regions, on a coarse grid so that overlaps tie."""
    rng = np.random.default_rng(seed)

    def boxes(count):
        corner, side = rng.integers(0, 12, (count, 2)), rng.integers(1, 10, (count, 2))
        return [tuple(map(float, box)) for box in np.hstack([corner, corner + side])]

    def side():
        count = int(rng.integers(0, 12))
        return list(zip(boxes(count), rng.choice(["a", "b"], count).tolist(), strict=True))

    images = []
    for _ in range(num_images):
        gts = side()
        near = [(tuple(map(float, np.add(box, [0, 0, *rng.integers(0, 2, 2)]))), desc) for box, desc in gts]
        images.append(image_of(near + side(), gts, crowd=(rng.random(len(gts)) < 0.15).tolist()))
    return images


def counted_one_by_one(
    image: ImageResult, threshold: float, class_aware: bool, scope: str
) -> tuple[Counts, float]:
    """Counts and total IoU of one image, class by class, by the definition."""
    pred, gt = image.pred, image.gt
    kept = [p for p, desc in enumerate(pred.descs) if scope == "all" or desc in gt.descs]
    iou_PG = pairwise_iou(pred.boxes_N4, gt.boxes_N4)
    totals, iou_sum = np.zeros(3, dtype=int), 0.0
    for desc in sorted({*pred.descs, *gt.descs}) if class_aware else [None]:
        preds = [p for p in kept if desc in (None, pred.descs[p])]
        gts = [g for g, name in enumerate(gt.descs) if desc in (None, name) and not gt.crowd_N[g]]
        crowds = [g for g, name in enumerate(gt.descs) if desc in (None, name) and gt.crowd_N[g]]
        pairs = match_at_threshold(iou_PG[np.ix_(preds, gts)], threshold)
        iou_sum += sum(iou_PG[preds[p], gts[g]] for p, g in pairs)
        excused = 0
        for p in set(range(len(preds))) - {p for p, _ in pairs}:
            box = np.array(pred.points[preds[p]])
            shares = [
                box_areas([*np.maximum(box[:2], gt.points[g][:2]), *np.minimum(box[2:], gt.points[g][2:])])
                / box_areas(box)
                for g in crowds
            ]
            excused += max(shares, default=0.0) >= threshold
        totals += [len(pairs), len(preds) - len(pairs) - excused, len(gts) - len(pairs)]
    return Counts(*totals.tolist()), iou_sum


@pytest.mark.parametrize("scope", ["all", "annotated"])
@pytest.mark.parametrize("class_aware", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_all_images_at_once_count_as_one_by_one(monkeypatch, seed, class_aware, scope):
    monkeypatch.setattr(
        box_matching, "_PAIRS_AT_ONCE", 100
    )  # so that the images are looked at in several blocks
    images, thresholds = crowded_images(seed), (0.3, 0.5, 0.8)
    summary = summary_of(*images, thresholds=thresholds, class_aware=class_aware, scope=scope)
    for t, threshold in enumerate(thresholds):
        expected = [counted_one_by_one(image, threshold, class_aware, scope) for image in images]
        assert summary.counts_NT3[:, t].tolist() == [list(counts) for counts, _ in expected]
        at, iou_sum = summary.at(threshold), sum(total for _, total in expected)
        assert at.matched_iou_mean == pytest.approx(iou_sum / at.counts.tp)
        assert np.sum(list(at.per_class.values()), axis=0).tolist() == list(at.counts)
        for match, image in zip(summary.matches(threshold), images, strict=True):
            assert (
                len({p for p, _, _ in match.pairs}) == len({g for _, g, _ in match.pairs}) == match.counts.tp
            )
            assert len(image.pred) >= match.counts.tp + match.counts.fp + len(match.ignored)
            for p, g, iou in match.pairs:
                assert iou == pytest.approx(pairwise_iou(image.pred.points[p], image.gt.points[g])[0, 0])
