"""Spreads and paired intervals, against hand-worked numbers and brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from coordexp.eval.evaluate import ScoredSet, evaluate, write_evaluation
from coordexp.eval.predictions.image_result import ImageResult, Objects
from coordexp.study.statistics import (
    Comparisons,
    ImageCounts,
    Resamples,
    SeedSpread,
    paired_difference,
    spreads,
)

NUM_IMAGES = 12


def test_spread_by_hand():
    assert SeedSpread.of([1.0, 2.0, 6.0]) == SeedSpread(3.0, 1.0, 6.0, pytest.approx(7.0**0.5))
    assert SeedSpread.of([0.25]) == SeedSpread(0.25, 0.25, 0.25, None)
    found = spreads([{"a": 1.0, "b": None}, {"a": 3.0, "b": 2.0}], ["a", "b", "c"])
    assert found == {"a": SeedSpread(2.0, 1.0, 3.0, pytest.approx(2.0**0.5))}


def test_paired_difference_is_that_of_the_mean_over_seeds():
    resampled = np.array([[0.0, 0.1, 0.2, 0.3, 0.4], [0.2, 0.3, 0.4, 0.5, 0.6]])
    found = paired_difference([0.1, 0.5], resampled)
    assert found.mean == pytest.approx(0.3)
    assert found.by_seed == (0.1, 0.5)
    assert (found.low, found.high) == pytest.approx((0.1 + 0.4 * 0.025, 0.1 + 0.4 * 0.975))


def images_of(seed: int, share: float) -> list[ImageResult]:
    """One object per image, found by a share of the predictions, the others 30 pixels away."""
    rng = np.random.default_rng(seed)
    images = []
    for index in range(NUM_IMAGES):
        shift = 0.0 if rng.random() < share else 30.0
        box = [10.0, 10.0, 30.0, 30.0]
        images.append(
            ImageResult(
                image_id=index,
                file_name=f"{index}.png",
                width=100,
                height=100,
                gt=Objects.of(["cat" if index % 2 else "dog"], [box]),
                pred=Objects.of(
                    ["cat" if index % 2 else "dog"], [[v + shift for v in box]], scores=[rng.random()]
                ),
            )
        )
    return images


def written(folder: Path, images: list[ImageResult]) -> Path:
    write_evaluation(evaluate(ScoredSet(folder.name, images)), folder)
    return folder


def test_as_they_are_the_numbers_are_those_of_the_evaluation(tmp_path):
    evaluation = evaluate(ScoredSet("x", images_of(0, 0.6)))
    write_evaluation(evaluation, tmp_path)
    answers = ImageCounts.of(tmp_path)
    found = Resamples.identity(NUM_IMAGES).numbers(answers)
    for name in ("f1_at_50", "f1_50_95", "AP", "AP75"):  # AP of pycocotools' rules, by hotcoco
        assert found[name][0] == pytest.approx(evaluation.metrics[name], abs=1e-12)


def test_interval_of_f1_is_that_of_scipy(tmp_path):
    """Every image has one prediction and one object, so F1 is the share of images with a match: a mean."""
    ours = [written(tmp_path / f"ours{seed}", images_of(seed, 0.8)) for seed in (1, 2)]
    theirs = [written(tmp_path / f"theirs{seed}", images_of(seed + 10, 0.3)) for seed in (1, 2)]
    found = Comparisons(num_f1=4000, num_ap=100, seed=0).differences(ours, theirs)["f1_at_50"]

    def matched(folders: list[Path]) -> np.ndarray:
        return np.mean([ImageCounts.of(folder).counts_NT3[:, 0, 0] for folder in folders], axis=0)

    gain_N = matched(ours) - matched(theirs)
    assert found.mean == pytest.approx(gain_N.mean())
    expected = stats.bootstrap(
        (gain_N,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.03)


def test_interval_of_ap_is_that_of_evaluating_every_resample_anew(tmp_path):
    a, b = images_of(3, 0.9), images_of(4, 0.4)
    comparisons = Comparisons(num_f1=100, num_ap=20, seed=5)
    found = comparisons.differences([written(tmp_path / "a", a)], [written(tmp_path / "b", b)])["AP"]
    drawn_BN = Resamples.draw(NUM_IMAGES, num_f1=100, num_ap=20, seed=5).ap_BN

    def resampled(images: list[ImageResult], weights_N: np.ndarray) -> float:
        copies = [image for image, n in zip(images, weights_N, strict=True) for _ in range(n)]
        renamed = [
            ImageResult(i, f"{i}.png", 100, 100, image.gt, image.pred) for i, image in enumerate(copies)
        ]
        return float(evaluate(ScoredSet("x", renamed)).metrics["AP"])

    gains = [resampled(a, weights) - resampled(b, weights) for weights in drawn_BN]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(gains, [0.025, 0.975])), abs=1e-9)


def test_evaluations_of_different_images_are_not_compared(tmp_path):
    a, b = written(tmp_path / "a", images_of(0, 1.0)), written(tmp_path / "b", images_of(0, 1.0)[1:])
    with pytest.raises(Exception, match="different images"):
        Comparisons(num_f1=100, num_ap=100, seed=0).differences([a], [b])
