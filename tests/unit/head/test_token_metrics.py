"""Token metrics against a brute-force computation in float64 numpy, and what must not change them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from coordexp.codec.token_types import TokenType
from coordexp.head import token_metrics
from coordexp.head.liger import OnPredicted
from coordexp.head.token_metrics import TokenMetrics, coord_mass, in_top, spread_rows
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import SupervisedRows
from coordexp.metrics.catalog import lookup

VOCAB = 40
COLUMNS = {
    "consecutive": CoordColumns(range(21, 33)),
    "scattered": CoordColumns([3, 30, 7, 22, 39, 11, 0, 18, 26, 35, 5, 9]),
}
TEXT_TYPES = (TokenType.STRUCT, TokenType.DESC, TokenType.EOS)
SPLIT = {"desc": (TokenType.DESC,), "format": (TokenType.STRUCT, TokenType.EOS), "coord": (TokenType.COORD,)}
SPLIT["text"] = SPLIT["desc"] + SPLIT["format"]


def make_rows(
    columns: CoordColumns, num_text: int, num_coord: int, seed: int = 0, ignored: float = 0.2
) -> tuple[torch.Tensor, SupervisedRows]:
    """Random logits and targets that are often right; some rows belong to a dataset that does not count."""
    rng = np.random.default_rng(seed)
    text_ids = np.setdiff1d(np.arange(VOCAB), columns.ids)
    bins = rng.integers(columns.num_bins, size=num_coord)
    targets = np.concatenate([rng.choice(text_ids, num_text), np.array(columns.ids)[bins]]).astype(np.int64)
    types = np.concatenate([rng.choice(TEXT_TYPES, num_text), np.full(num_coord, TokenType.COORD)])
    types[rng.random(len(types)) < ignored] = TokenType.IGNORE
    logits = rng.normal(0, 2, (len(targets), VOCAB)).astype(np.float32)
    logits[np.arange(len(targets)), targets] += rng.choice([0.0, 3.0, 9.0], len(targets))
    rows = SupervisedRows(
        torch.arange(len(targets)),
        torch.from_numpy(targets),
        num_text,
        torch.from_numpy(bins),
        types_R=torch.from_numpy(types.astype(np.int8)),
    )
    return torch.from_numpy(logits), rows


def brute_force(logits: torch.Tensor, rows: SupervisedRows, columns: CoordColumns) -> dict[str, tuple]:
    """Every key as (sum, count), one row after another; keys of nothing are absent."""
    sums: dict[str, list[float]] = {}

    def add(key: str, value: float) -> None:
        sums.setdefault(key, []).append(value)

    for r in range(rows.num_rows):
        z = logits[r].numpy().astype(np.float64)
        target, row_type = int(rows.targets_R[r]), TokenType(int(rows.types_R[r]))
        best = int(np.argmax(z))
        hit, top5 = float(best == target), float((z > z[target]).sum() < 5)
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        add("token_acc", hit)
        add("token_acc_top5", top5)
        if target not in columns.ids:
            add("text_token_acc", hit)
        if row_type == TokenType.IGNORE:
            continue
        for name, of in SPLIT.items():
            if name != "text":
                add(f"{name}_token_frac", float(row_type in of))
            if row_type not in of:
                continue
            add(f"coord_monitor/coord_vocab_mass_at_gt_{name}", p[list(columns.ids)].sum())
            if name == "coord":
                add("coord_monitor/flip_coord_to_noncoord", float(best not in columns.ids))
            else:
                add(f"coord_monitor/flip_{name}_to_coord", float(best in columns.ids))
            if name != "text":
                add(f"{name}_token_acc", hit)
                add(f"{name}_token_acc_top5", top5)
    return {key: (math.fsum(values), len(values)) for key, values in sums.items()}


def measure(
    logits: torch.Tensor, rows: SupervisedRows, columns: CoordColumns, chunk: int = 10_000, **switches
) -> dict[str, tuple[float, float]]:
    """Sum and count of every key that would reach a log."""
    tokens = TokenMetrics(rows, columns, **switches)
    for where, piece in rows.chunks(chunk):
        tokens.observer(logits[where], piece)
    return {key: (float(s), float(n)) for key, (s, n) in tokens.metrics().items() if float(n)}


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, pair in expected.items():
        assert found[key] == pytest.approx(pair, rel=2e-6), key


@pytest.mark.parametrize("columns", COLUMNS.values(), ids=list(COLUMNS))
@pytest.mark.parametrize(("num_text", "num_coord"), [(57, 24), (1, 1), (200, 3)])
def test_every_key_equals_brute_force(columns, num_text, num_coord):
    logits, rows = make_rows(columns, num_text, num_coord, seed=num_text)
    found = measure(logits, rows, columns)
    assert_same(found, brute_force(logits, rows, columns))
    assert all(lookup(key) is not None for key in found)


def test_hand_worked_rows():
    columns = CoordColumns([3, 4])
    ln2 = math.log(2)
    logits = torch.tensor(
        [
            [ln2, 0.0, 0.0, 0.0, 0.0],  # desc 0: right; mass 2/6
            [0.0, 0.0, 0.0, ln2, 0.0],  # format 1: answers with a coordinate; mass 3/6
            [0.0, 0.0, ln2, 0.0, 0.0],  # coord 4: answers with text; mass 2/6
        ]
    )
    types = torch.tensor([TokenType.DESC, TokenType.EOS, TokenType.COORD], dtype=torch.int8)
    rows = SupervisedRows(torch.arange(3), torch.tensor([0, 1, 4]), 2, torch.tensor([1]), types_R=types)
    found = {key: total / count for key, (total, count) in measure(logits, rows, columns, top5=False).items()}
    assert found == pytest.approx(
        {
            "token_acc": 1 / 3,
            "text_token_acc": 1 / 2,
            "desc_token_frac": 1 / 3,
            "format_token_frac": 1 / 3,
            "coord_token_frac": 1 / 3,
            "desc_token_acc": 1.0,
            "format_token_acc": 0.0,
            "coord_token_acc": 0.0,
            "coord_monitor/flip_desc_to_coord": 0.0,
            "coord_monitor/flip_format_to_coord": 1.0,
            "coord_monitor/flip_text_to_coord": 0.5,
            "coord_monitor/flip_coord_to_noncoord": 1.0,
            "coord_monitor/coord_vocab_mass_at_gt_desc": 1 / 3,
            "coord_monitor/coord_vocab_mass_at_gt_format": 1 / 2,
            "coord_monitor/coord_vocab_mass_at_gt_text": 5 / 12,
            "coord_monitor/coord_vocab_mass_at_gt_coord": 1 / 3,
        }
    )


@pytest.mark.parametrize("cap", [0, 13])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_and_blocks_change_nothing(chunk, cap, monkeypatch):
    columns = COLUMNS["scattered"]
    logits, rows = make_rows(columns, 57, 24)
    whole = measure(logits, rows, columns, mass_max_tokens=cap)
    monkeypatch.setitem(token_metrics.BLOCK_BYTES, "cpu", 4 * VOCAB * 5)
    assert_same(measure(logits, rows, columns, chunk, mass_max_tokens=cap), whole)


@pytest.mark.parametrize("absent", ["text", "coord", "all but ignored", "every row"])
def test_absent_types_leave_no_key(absent):
    columns = COLUMNS["consecutive"]
    logits, rows = make_rows(
        columns, 0 if absent == "text" else 9, 0 if absent == "coord" else 4, ignored=0.0
    )
    if absent == "all but ignored":
        rows = replace(rows, types_R=torch.zeros_like(rows.types_R))
    if absent == "every row":
        logits, rows = logits[:0], rows.text_slice(0, 0)
    found = measure(logits, rows, columns)
    assert_same(found, brute_force(logits, rows, columns))
    expected = {"all but ignored": {"token_acc", "token_acc_top5", "text_token_acc"}, "every row": set()}
    if absent in expected:
        assert found.keys() == expected[absent]
    else:
        assert not [key for key in found if f"gt_{absent}" in key or key == f"{absent}_token_acc"]


def test_switches():
    columns = COLUMNS["consecutive"]
    logits, rows = make_rows(columns, 30, 10)
    everything = measure(logits, rows, columns)
    masses = {key for key in everything if "mass" in key}
    top5 = {key for key in everything if "top5" in key}
    assert (len(masses), len(top5)) == (4, 4)
    assert measure(logits, rows, columns, mass=False).keys() == everything.keys() - masses
    assert measure(logits, rows, columns, top5=False).keys() == everything.keys() - top5
    lean = measure(logits, rows, columns, mass=False, top5=False)
    assert lean == {key: everything[key] for key in everything.keys() - masses - top5}
    untyped = measure(logits, replace(rows, types_R=None), columns)
    assert untyped == {"token_acc": everything["token_acc"]}


def test_logits_are_asked_for_only_where_an_arg_max_will_not_do():
    _, rows = make_rows(COLUMNS["consecutive"], 3, 3)
    needs_logits = [
        not isinstance(
            TokenMetrics(made_of, COLUMNS["consecutive"], top5=top5, mass=mass).observer, OnPredicted
        )
        for made_of in (rows, replace(rows, types_R=None))
        for top5, mass in ((True, True), (True, False), (False, True), (False, False))
    ]
    assert needs_logits == [True, True, True, False, False, False, False, False]


@pytest.mark.parametrize("cap", [1, 10, 50])
def test_cap_takes_the_mass_of_the_chosen_rows_only(cap):
    columns = COLUMNS["consecutive"]
    logits, rows = make_rows(columns, 60, 21)
    found = measure(logits, rows, columns, mass_max_tokens=cap)
    chosen = torch.zeros(rows.num_rows, dtype=torch.bool)
    chosen[spread_rows(rows.num_rows, cap)] = True
    assert int(chosen.sum()) == cap
    types_R = torch.where(chosen, rows.types_R, torch.zeros_like(rows.types_R))
    of_chosen = brute_force(logits, replace(rows, types_R=types_R), columns)
    masses = {key: pair for key, pair in of_chosen.items() if "mass" in key}
    assert_same({key: pair for key, pair in found.items() if "mass" in key}, masses)
    rest = brute_force(logits, rows, columns)
    assert_same(
        {key: pair for key, pair in found.items() if "mass" not in key},
        {key: pair for key, pair in rest.items() if "mass" not in key},
    )


@pytest.mark.parametrize("num_rows", [11, 480, 5000])
def test_chosen_rows_are_spread_and_follow_no_period(num_rows):
    cap = num_rows // 5
    rows = spread_rows(num_rows, cap)
    assert len(set(rows.tolist())) == cap
    assert rows.min() >= 0
    assert rows.max() < num_rows
    assert np.diff(rows).max() <= 9  # a fifth of the rows: no gap is much longer than 5
    if num_rows > 100:
        for period in (4, 12, 20):
            shares = np.bincount(rows % period, minlength=period) / len(rows)
            assert np.abs(shares * period - 1).max() < 0.7


def test_no_more_rows_than_the_cap_are_all_taken():
    assert spread_rows(7, 7) is None
    assert spread_rows(7, 0) is None


def test_ties_count_for_the_target():
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0], [3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0]])
    assert in_top(logits, torch.tensor([6, 5])).tolist() == [True, True]
    assert in_top(logits, torch.tensor([0, 6])).tolist() == [False, False]
    assert in_top(logits[:, :3], torch.tensor([0, 2])).tolist() == [True, True]  # fewer than five tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mass_of_large_logits_stays_exact(dtype):
    logits = torch.zeros(2, 6, dtype=dtype)
    logits[0, 4], logits[1, 0] = 300.0, 300.0
    mass = coord_mass(logits, CoordColumns([4, 5]))
    assert mass.dtype == torch.float32
    assert mass.tolist() == [1.0, 0.0]
