"""The metric store: reductions by hand, brute force against two real gloo ranks, no host syncs."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import coordexp
from coordexp.errors import ContractError
from coordexp.metrics.accumulate import MetricStore

RANK_PROGRAM = Path(__file__).with_name("gloo_rank.py")


@pytest.fixture
def store() -> MetricStore:
    return MetricStore(strict=True)


def test_each_reduction_by_hand(store: MetricStore) -> None:
    store.add("rollout/parse_dropped_invalid", 3)
    store.add("rollout/parse_dropped_invalid", torch.tensor(4))
    store.add("coord_diag/w1", 6.0, 2)  # two tokens
    store.add("coord_diag/w1", torch.tensor(1.0), torch.tensor(8))  # eight tokens
    store.add("coord_diag/expected_bin_abs_err_p90", 10.0)
    store.add("coord_diag/expected_bin_abs_err_p90", 20.0)
    store.add("rollout/precision", 1, 2)
    store.add("rollout/precision", 3, 6)
    store.add("time/rollout_generate_s", 1.5)
    store.add("time/rollout_generate_s", torch.tensor(0.5))
    store.add("rollout/gen_new_tokens_p99", 90.0)
    store.add("rollout/gen_new_tokens_p99", 70.0)
    store.add("coord_diag/enabled", 1.0)
    store.add("coord_diag/enabled", 0.0)
    assert store.flush("train") == {
        "rollout/parse_dropped_invalid": 7.0,
        "coord_diag/w1": pytest.approx(0.7),
        "coord_diag/expected_bin_abs_err_p90": 15.0,
        "rollout/precision": 0.5,
        "time/rollout_generate_s": 1.5,
        "rollout/gen_new_tokens_p99": 90.0,
        "coord_diag/enabled": 1.0,
    }


def test_absent_is_not_zero_and_zero_is_not_absent(store: MetricStore) -> None:
    store.add("rollout/parse_dropped_invalid", 0)
    store.add("rollout/precision", 0, 0)
    store.add("coord_diag/loss", torch.tensor(0.0), torch.tensor(0))
    assert store.flush("train") == {"rollout/parse_dropped_invalid": 0.0}
    assert store.flush("train") == {}


def test_negative_maxima_survive(store: MetricStore) -> None:
    store.add("time/rollout_generate_s", -3.0)
    store.add("time/rollout_generate_s", torch.tensor(-2.0))
    assert store.flush("train") == {"time/rollout_generate_s": -2.0}


def test_modes_have_their_own_window_and_evaluation_its_prefix(store: MetricStore) -> None:
    store.add("base_ce/loss", 4.0, 2)
    store.add("base_ce/loss", 9.0, 3, mode="eval")
    assert store.flush("eval") == {"eval_base_ce/loss": 3.0}
    assert store.flush("train") == {"base_ce/loss": 2.0}
    with pytest.raises(ContractError, match="'test'"):
        store.add("base_ce/loss", 1.0, mode="test")
    with pytest.raises(ContractError, match="'test'"):
        store.flush("test")


def test_what_is_computed_again_is_not_added(store: MetricStore) -> None:
    store.add("base_ce/loss", 4.0, 2.0, mode="eval")
    with store.paused():
        store.add("base_ce/loss", 100.0, 1.0, mode="eval")
        store.add_all({"latent/nll_per_token": (1.0, 1.0)}, mode="eval")
    store.add("base_ce/loss", 2.0, 1.0, mode="eval")
    assert store.flush("eval") == {"eval_base_ce/loss": 2.0}


def test_helper_keys_never_leave(store: MetricStore) -> None:
    store.add_all({"rollout/_matched_num": 3.0, "_x": (1.0, 2.0), "pack/num_samples": 4})
    assert store.flush("train") == {"pack/num_samples": 4.0}


def test_a_rate_needs_its_denominator(store: MetricStore) -> None:
    with pytest.raises(
        ContractError, match=r"'rollout/f1' is a rate: pass its numerator and its denominator"
    ):
        store.add("rollout/f1", 0.5)


def test_a_tensor_must_be_0_dim(store: MetricStore) -> None:
    with pytest.raises(ContractError, match=r"'coord_diag/w1': a tensor of shape \(2,\)"):
        store.add("coord_diag/w1", torch.ones(2), 2)


def test_unknown_key_is_refused_in_strict_mode_and_kept_otherwise(store: MetricStore) -> None:
    with pytest.raises(ContractError, match="'coord_diag/w2' is not in the catalogue"):
        store.add("coord_diag/w2", 1.0)
    relaxed = MetricStore(strict=False)
    relaxed.add("brand/new_total", 1.0)
    relaxed.add("brand/new_total", 2.0)
    assert relaxed.flush("train") == {"brand/new_total": 3.0}


def test_values_that_are_not_finite_are_left_out_counted_and_named_once(
    store: MetricStore, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        store.add("coord_diag/w1", torch.tensor(math.nan), 3)
        store.add("time/rollout_generate_s", math.nan)
        store.add("time/rollout_generate_s", 1.0)
        store.add("base_ce/loss", 2.0, 1)
        assert store.flush("train") == {"base_ce/loss": 2.0, "health/nonfinite_metrics_total": 2.0}
    assert [record.args[0] for record in caplog.records if record.levelno == logging.WARNING] == [
        "coord_diag/w1",
        "time/rollout_generate_s",
    ]


def test_mixed_dtypes_and_many_values_add_up_in_float64(store: MetricStore) -> None:
    values = [torch.tensor(1.0, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.int64)]
    for i in range(3000):
        store.add("train/samples_total", values[i % 3])
    store.add("train/samples_total", torch.tensor(2**24, dtype=torch.float32))
    assert store.flush("train") == {"train/samples_total": 2**24 + 3000.0}


def test_a_view_does_not_keep_its_large_tensor_alive(store: MetricStore) -> None:
    large = torch.zeros(10_000)
    store.add("coord_diag/w1", large[5])
    (held,) = store._windows["train"]["coord_diag/w1"].total.pending
    assert held.untyped_storage().nbytes() <= 512


def test_the_graph_is_not_kept(store: MetricStore) -> None:
    loss = (torch.ones(3, requires_grad=True) * 2).sum()
    store.add("base_ce/loss", loss, 3)
    assert all(not t.requires_grad for t in store._windows["train"]["base_ce/loss"].total.pending)


def test_adding_never_waits_for_the_device(store: MetricStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("host sync between flushes")

    with monkeypatch.context() as patch:
        for name in ("item", "cpu", "tolist", "numpy", "__float__", "__int__", "__bool__"):
            patch.setattr(torch.Tensor, name, forbidden)
        for i in range(1000):  # beyond the block size, so folding is covered
            store.add("coord_diag/w1", torch.tensor(float(i)), torch.tensor(1))
            store.add("rollout/gen_new_tokens_p99", torch.tensor(i))
    assert store.flush("train") == {"coord_diag/w1": 499.5, "rollout/gen_new_tokens_p99": 999.0}


SUMS = ("train/samples_total", "rollout/fn_total")
MEANS = ("coord_diag/loss", "coord_diag/expected_bin_mae")  # weighted by their counts
GAUGES = ("pack/num_samples", "coord_diag/expected_bin_abs_err_p90")  # one value a micro-step
RATES = ("rollout/precision", "rollout/parse_truncated_rate")
MAXIMA = ("time/rollout_generate_s", "rollout/gen_new_tokens_p99", "coord_diag/enabled")


def ragged_windows(num_windows: int, num_ranks: int, num_micro_steps: int) -> list[Any]:
    """Random values with ragged counts; each key is present on about half of the micro-steps of each rank."""
    rng = random.Random(20)

    def micro_step() -> list[Any]:
        rows = [[key, rng.randint(0, 9), None] for key in SUMS]
        counts = [rng.choice([0, 1, 2, 40]) for _ in MEANS]
        rows += [[key, rng.uniform(-5, 5) * n, n] for key, n in zip(MEANS, counts, strict=True)]
        rows += [[key, rng.uniform(0, 9), None] for key in GAUGES]
        rows += [[key, rng.randint(0, 7), rng.randint(7, 20)] for key in RATES]
        rows += [[key, rng.uniform(-2, 2), None] for key in MAXIMA]
        return [row for row in rows if rng.random() < 0.5]

    return [
        [[micro_step() for _ in range(num_micro_steps)] for _ in range(num_ranks)] for _ in range(num_windows)
    ]


def brute_force(ranks: list[Any]) -> dict[str, float]:
    """The reductions over all values of a window, written out from their definitions."""
    rows = [row for micro_steps in ranks for micro_step in micro_steps for row in micro_step]
    expected: dict[str, float] = {}
    for key in {row[0] for row in rows}:
        values = [value for name, value, _ in rows if name == key]
        counts = [count for name, _, count in rows if name == key]
        if key in SUMS:
            expected[key] = sum(values)
        elif key in MAXIMA:
            expected[key] = max(values)
        elif key in GAUGES:
            expected[key] = sum(values) / len(values)
        elif sum(counts):
            expected[key] = sum(values) / sum(counts)
    return expected


def run_ranks(windows: list[Any], num_ranks: int, folder: Path) -> list[Any]:
    """What each gloo rank flushed, window by window."""
    data = folder / "data.json"
    data.write_text(json.dumps(windows))
    root = str(Path(coordexp.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COORDEXP_STRICT_METRICS": "1", "PYTHONPATH": root}
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                str(RANK_PROGRAM),
                str(rank),
                str(num_ranks),
                str(folder / "rendezvous"),
                str(data),
            ],
            stdout=subprocess.PIPE,
            env=environment,
        )
        for rank in range(num_ranks)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * num_ranks
    return [json.loads(output) for output in outputs]


SAME = [["base_ce/loss", 4.0, 2]]
MORE = [["base_ce/loss", 4.0, 2], ["accum/grad_steps", 8, None]]
KEY_SETS = [[[SAME], [SAME]], [[SAME], [SAME]], [[SAME], [MORE]], [[[]], [MORE]], [[[]], [[]]]]
"""Windows of two ranks: a first key, again, a key new to one rank only, one rank empty, both empty."""


@pytest.fixture(scope="module")
def flushed_by_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[Any]]:
    """Windows and what two gloo ranks flushed for each of them: first KEY_SETS, then random ones."""
    windows = KEY_SETS + ragged_windows(num_windows=4, num_ranks=2, num_micro_steps=4)
    windows[-2][0] = [[] for _ in range(4)]  # a window in which rank 0 has nothing at all
    return windows, run_ranks(windows, 2, tmp_path_factory.mktemp("ranks"))


def test_two_ranks_equal_brute_force_with_keys_absent_on_some(flushed_by_two_ranks: Any) -> None:
    windows, (first, second) = flushed_by_two_ranks
    start = len(KEY_SETS)
    for window, flushed, other in zip(windows[start:], first[start:], second[start:], strict=True):
        assert flushed["metrics"] == pytest.approx(brute_force(window), rel=1e-12)
        assert flushed["metrics"] == other["metrics"]


def test_one_collective_once_the_keys_are_known_and_no_hang_before(flushed_by_two_ranks: Any) -> None:
    _, ranks = flushed_by_two_ranks
    growing, steady = {"all_gather": 2, "all_gather_object": 1}, {"all_gather": 1}
    for flushed in ranks:
        assert [window["collectives"] for window in flushed[:5]] == [growing, steady, growing, steady, steady]
        assert [window["metrics"] for window in flushed[2:5]] == [
            {"base_ce/loss": 2.0, "accum/grad_steps": 8.0},
            {"base_ce/loss": 2.0, "accum/grad_steps": 8.0},
            {},
        ]
