"""Samples, tokens, pictures and micro-steps over log windows, a checkpoint and a resume."""

from __future__ import annotations

import json

from coordexp.metrics.accumulate import MetricStore
from coordexp.metrics.progress import Progress


def trained(progress: Progress, *steps: tuple[int, int]) -> None:
    """Steps of (micro-steps, samples)."""
    for num_micro_steps, num_samples in steps:
        progress.add_step(num_micro_steps)
        progress.add_samples(num_samples)


def test_a_window_counts_its_steps_and_the_run():
    store = MetricStore(strict=True)
    progress = Progress(store, grad_steps=4)
    trained(progress, (4, 13), (2, 5))
    assert progress.finish(store.flush(), "train") == {
        "train/micro_steps": 3,
        "accum/grad_steps": 4,
        "accum/current_grad_steps": 3,
        "train/samples_total": 18,
        "train/samples_seen": 18,
    }
    trained(progress, (4, 12))
    window = progress.finish(store.flush(), "train")
    assert (window["train/samples_total"], window["train/samples_seen"]) == (12, 30)


def test_a_checkpoint_between_logs_keeps_what_was_not_logged_yet():
    store = MetricStore(strict=True)
    progress = Progress(store, grad_steps=1)
    trained(progress, (1, 8))
    progress.finish(store.flush(), "train")
    trained(progress, (1, 3))
    # Two ranks: the other one has 4 samples since the last log.
    state = json.loads(json.dumps(progress.state(lambda own: [own[0] + 4, *own[1:]])))

    resumed_store = MetricStore(strict=True)
    resumed = Progress(resumed_store, grad_steps=1)
    resumed.restore(state)
    trained(resumed, (1, 10))
    assert resumed.finish(resumed_store.flush(), "train")["train/samples_seen"] == 8 + 3 + 4 + 10


def test_evaluation_shows_the_accumulation_of_the_last_step():
    store = MetricStore(strict=True)
    progress = Progress(store, grad_steps=4)
    assert progress.finish({}, "eval") == {}
    trained(progress, (4, 1), (2, 1))
    assert progress.finish({}, "eval") == {"eval_accum/grad_steps": 4, "eval_accum/current_grad_steps": 2}


def test_a_run_that_starts_anew_starts_at_zero():
    store = MetricStore(strict=True)
    progress = Progress(store, grad_steps=1)
    progress.restore(None)
    trained(progress, (1, 2))
    assert progress.finish(store.flush(), "train")["train/samples_seen"] == 2


def test_samples_of_each_data_set_over_windows_and_a_resume():
    store = MetricStore(strict=True)
    progress = Progress(store, 1, ["a", "b"])
    progress.add_samples(4, ["a", "b", "a", "a"])
    window = progress.finish(store.flush(), "train")
    assert (window["dataset/a/samples_total"], window["dataset/b/samples_total"]) == (3, 1)
    assert (window["dataset/a/share"], window["dataset/b/share"]) == (0.75, 0.25)
    progress.add_samples(2, ["b", "b"])
    state = json.loads(
        json.dumps(progress.state(lambda own: [2 * number for number in own]))
    )  # of two ranks, alike since the last log

    resumed_store = MetricStore(strict=True)
    resumed = Progress(resumed_store, 1, ["a", "b", "added"])
    resumed.restore(state)
    resumed.add_samples(2, ["a", "added"])
    window = resumed.finish(resumed_store.flush(), "train")
    assert [window[f"dataset/{name}/samples_seen"] for name in ("a", "b", "added")] == [4, 5, 1]
    assert window["dataset/added/share"] == 0.1
    assert "dataset/b/samples_total" not in window


def test_tokens_and_pictures_run_on_over_windows_and_a_resume():
    store = MetricStore(strict=True)
    progress = Progress(store, grad_steps=1)
    trained(progress, (1, 2), (1, 2))
    progress.add_load(num_tokens=70, num_images=2)
    progress.add_load(num_tokens=30, num_images=3)
    for seconds in (0.5, 1.5):
        store.add("time/step_s", seconds, 1.0)
    window = progress.finish(store.flush(), "train")
    assert (window["train/tokens_total"], window["train/tokens_seen"], window["train/images_seen"]) == (
        100,
        100,
        5,
    )
    assert window["train/tokens_per_s"] == 100 / (0.5 + 1.5)

    trained(progress, (1, 2))
    progress.add_load(num_tokens=7, num_images=1)
    state = json.loads(json.dumps(progress.state(list)))
    resumed_store = MetricStore(strict=True)
    resumed = Progress(resumed_store, grad_steps=1)
    resumed.restore(state)
    trained(resumed, (1, 1))
    resumed.add_load(num_tokens=11, num_images=4)
    window = resumed.finish(resumed_store.flush(), "train")
    assert (window["train/tokens_seen"], window["train/images_seen"]) == (100 + 7 + 11, 5 + 1 + 4)


def test_a_checkpoint_that_counted_samples_only_starts_the_other_counts_at_zero():
    store = MetricStore(strict=True)
    progress = Progress(store, grad_steps=1)
    progress.restore({"args": {}, "attributes": {"samples_seen": 40.0}})
    trained(progress, (1, 2))
    progress.add_load(num_tokens=9, num_images=2)
    window = progress.finish(store.flush(), "train")
    assert (window["train/samples_seen"], window["train/tokens_seen"]) == (42, 9)
