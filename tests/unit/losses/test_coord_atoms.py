"""Coordinate atoms against float64 formulas, forward and backward, and against hand-worked numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coordexp.errors import ConfigError, ContractError
from coordexp.losses.columns import CoordColumns
from coordexp.losses.coord import (
    coord_ehuber,
    coord_el1,
    coord_entropy,
    coord_gate,
    coord_monitors,
    coord_soft_ce,
    coord_token_ce,
    coord_w1,
    gaussian_targets,
    text_gate,
)
from coordexp.losses.sums import SumCount

K, V, START = 1000, 1203, 150
IDS = list(range(START, START + K))
SIGMA, DELTA = 2.0, 0.05

# --- references: one row at a time, float64, written from the formulas ---------------------------------


def ref_target(g, truncate, sigma=SIGMA):
    k = torch.arange(K, dtype=torch.float64)
    q = torch.exp(-((k - g) ** 2) / (2 * sigma**2))
    if truncate is not None:
        q = torch.where((k - g).abs() > truncate, 0.0, q)
    return q / q.sum()


def ref_log_p(z, temperature):
    scaled = z / temperature
    return scaled - torch.logsumexp(scaled, 0)


def ref_soft_ce(z, g, temperature, truncate):
    return -(ref_target(g, truncate) * ref_log_p(z, temperature)).sum()


def ref_w1(z, g, temperature, truncate):
    cdf_p = torch.cumsum(ref_log_p(z, temperature).exp(), 0)
    cdf_q = torch.cumsum(ref_target(g, truncate), 0)
    return (cdf_p - cdf_q).abs().sum() / (K - 1)


def ref_token_ce(z, g, temperature, truncate):
    return -ref_log_p(z, 1.0)[g]


def ref_el1(z, g, temperature, truncate):
    k = torch.arange(K, dtype=torch.float64)
    return (ref_log_p(z, temperature).exp() * (k - g).abs()).sum() / 999


def ref_ehuber(z, g, temperature, truncate):
    d = (torch.arange(K, dtype=torch.float64) - g).abs() / 999
    huber = torch.where(d <= DELTA, d**2 / (2 * DELTA), d - DELTA / 2)
    return (ref_log_p(z, temperature).exp() * huber).sum()


def ref_entropy(z, g, temperature, truncate):
    log_p = ref_log_p(z, temperature)
    return -(log_p.exp() * log_p).sum()


def ref_gate(z, temperature):
    return torch.logsumexp(z / temperature, 0) - torch.logsumexp(z[IDS] / temperature, 0)


def ref_text_gate(z, temperature):
    others = [v for v in range(V) if v not in set(IDS)]
    return torch.logsumexp(z / temperature, 0) - torch.logsumexp(z[others] / temperature, 0)


SLOT_ATOMS = {
    "soft_ce": (
        lambda z, g, T, cut: coord_soft_ce(z, g, sigma=SIGMA, truncate=cut, temperature=T),
        ref_soft_ce,
    ),
    "w1": (lambda z, g, T, cut: coord_w1(z, g, sigma=SIGMA, truncate=cut, temperature=T), ref_w1),
    "token_ce": (lambda z, g, T, cut: coord_token_ce(z, g, temperature=T), ref_token_ce),
    "el1": (lambda z, g, T, cut: coord_el1(z, g, temperature=T), ref_el1),
    "ehuber": (lambda z, g, T, cut: coord_ehuber(z, g, delta=DELTA, temperature=T), ref_ehuber),
    "entropy": (lambda z, g, T, cut: coord_entropy(z, g, temperature=T), ref_entropy),
}
GATES = {"coord_gate": (coord_gate, ref_gate), "text_gate": (text_gate, ref_text_gate)}


def slot_logits(kind, num_rows, width=K):
    g = torch.Generator().manual_seed(3)
    random = torch.randn(num_rows, width, generator=g)
    if kind == "random":
        return random * 3
    if kind == "extreme":  # +-1e4, both signs in each row
        return random.sign() * 1e4
    if kind == "one_hot":
        return torch.full((num_rows, width), -1e4).index_fill_(1, torch.tensor([width // 3]), 1e4)
    return torch.full((num_rows, width), 1e4 / 3)  # uniform, far from 0


BINS = torch.tensor([0, 999, 500, 1, 998, 333, 7])


def value_and_grad(fn, logits):
    logits = logits.clone().requires_grad_()
    total = fn(logits)
    total.backward()
    return total.detach(), logits.grad


def assert_matches(ours, reference, *, rtol=1e-4, atol=1e-6):
    """Relative to the largest entry: sums and gradients in float32 carry its rounding."""
    (value, grad), (ref_value, ref_grad) = ours, reference
    scale = max(ref_grad.abs().max().item(), 1e-3)
    torch.testing.assert_close(value.double(), ref_value, rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), ref_grad, rtol=rtol, atol=max(atol, 2e-5) * scale)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("truncate", [None, 8, 0])
@pytest.mark.parametrize("name", SLOT_ATOMS)
def test_slot_atoms_match_float64_formula(name, truncate, temperature):
    atom, reference = SLOT_ATOMS[name]
    logits = slot_logits("random", len(BINS))

    ours = value_and_grad(lambda z: atom(z, BINS, temperature, truncate).sum, logits)
    expected = value_and_grad(
        lambda z: sum(reference(z[n], int(g), temperature, truncate) for n, g in enumerate(BINS)),
        logits.double(),
    )

    assert_matches(ours, expected)
    assert atom(logits, BINS, temperature, truncate).count == len(BINS)


@pytest.mark.parametrize("kind", ["extreme", "one_hot", "uniform"])
@pytest.mark.parametrize("name", SLOT_ATOMS)
def test_slot_atoms_at_extreme_logits(name, kind):
    atom, reference = SLOT_ATOMS[name]
    logits = slot_logits(kind, len(BINS))

    ours = value_and_grad(lambda z: atom(z, BINS, 1.0, None).sum, logits)
    expected = value_and_grad(
        lambda z: sum(reference(z[n], int(g), 1.0, None) for n, g in enumerate(BINS)), logits.double()
    )

    assert all(torch.isfinite(x).all() for x in ours)
    assert_matches(ours, expected)


@pytest.mark.parametrize("name", SLOT_ATOMS)
def test_slot_atoms_in_bfloat16_are_no_worse_than_plain_bfloat16(name):
    atom, reference = SLOT_ATOMS[name]
    logits = slot_logits("random", len(BINS)).bfloat16()
    truth = sum(reference(z, int(g), 1.0, None) for z, g in zip(logits.double(), BINS, strict=True))

    ours = atom(logits, BINS, 1.0, None)
    in_bf16 = plain_in_dtype(name, logits)

    assert ours.sum.dtype == torch.float32
    assert abs(ours.sum.item() - truth.item()) <= abs(in_bf16.item() - truth.item()) + 1e-4 * abs(
        truth.item()
    )
    _, grad = value_and_grad(lambda z: atom(z, BINS, 1.0, None).sum, logits)
    assert grad.dtype == torch.bfloat16
    assert torch.isfinite(grad).all()


def plain_in_dtype(name, z):
    """The same quantities computed without leaving the dtype of z."""
    log_p = F.log_softmax(z, -1)
    p = log_p.exp()
    q = gaussian_targets(BINS, K, SIGMA).to(z.dtype)
    d = ((torch.arange(K) - BINS.unsqueeze(1)).abs() / 999).to(z.dtype)
    return {
        "soft_ce": lambda: -(q * log_p).sum(),
        "w1": lambda: (p.cumsum(-1) - q.cumsum(-1)).abs().sum() / (K - 1),
        "token_ce": lambda: F.cross_entropy(z, BINS, reduction="sum"),
        "el1": lambda: (p * d).sum(),
        "ehuber": lambda: (p * torch.where(d <= DELTA, d**2 / (2 * DELTA), d - DELTA / 2)).sum(),
        "entropy": lambda: -(p * log_p).sum(),
    }[name]()


@pytest.mark.parametrize("kind", ["random", "extreme", "uniform"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", GATES)
def test_gates_match_float64_formula(name, temperature, kind):
    atom, reference = GATES[name]
    logits = slot_logits(kind, 3, V)

    ours = value_and_grad(lambda z: atom(z, IDS, temperature=temperature).sum, logits)
    expected = value_and_grad(lambda z: sum(reference(row, temperature) for row in z), logits.double())

    assert_matches(ours, expected)


def test_gates_in_bfloat16_equal_float32_of_the_same_logits():
    logits = slot_logits("random", 5, V).bfloat16()
    for atom in (coord_gate, text_gate):
        assert atom(logits, IDS).sum == atom(logits.float(), IDS).sum


@pytest.mark.parametrize("num_rows", [0, 1])
def test_few_rows(num_rows):
    z = torch.randn(num_rows, V, requires_grad=True)
    coord, bins = z[:, START : START + K], BINS[:num_rows]
    atoms = [atom(coord, bins, 1.0, None) for atom, _ in SLOT_ATOMS.values()]
    atoms += [atom(z, IDS) for atom, _ in GATES.values()]

    sum(atom.sum for atom in atoms).backward()

    assert [atom.count.item() for atom in atoms] == [num_rows] * 8
    assert z.grad.shape == (num_rows, V)
    if num_rows == 0:
        assert [atom.sum.item() for atom in atoms] == [0.0] * 8
        assert [atom.mean().item() for atom in atoms] == [0.0] * 8


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_gradcheck(temperature):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(3, 11, generator=g, dtype=torch.float64, requires_grad=True)
    bins = torch.tensor([0, 10, 4])
    for atom in (
        lambda z: coord_soft_ce(z, bins, sigma=1.5, truncate=3, temperature=temperature).sum,
        lambda z: coord_w1(z, bins, sigma=1.5, temperature=temperature).sum,
        lambda z: coord_token_ce(z, bins).sum,
        lambda z: coord_el1(z, bins, temperature=temperature).sum,
        lambda z: coord_ehuber(z, bins, delta=0.3, temperature=temperature).sum,
        lambda z: coord_entropy(z, temperature=temperature).sum,
        lambda z: coord_gate(z, [2, 3, 4, 5], temperature=temperature).sum,
        lambda z: text_gate(z, [7, 3, 0], temperature=temperature).sum,
    ):
        assert torch.autograd.gradcheck(atom, (z,))


def test_text_gate_is_finite_where_nearly_everything_is_coordinates():
    z = torch.full((1, V), -60.0)
    z[0, IDS] = -math.log(K)  # coordinates hold 1 in total
    others = [v for v in range(V) if not START <= v < START + K]
    z[0, others] = math.log(1e-9 / len(others))  # and the rest 1e-9
    value, grad = value_and_grad(lambda z: text_gate(z, IDS).sum, z)

    assert value.item() == pytest.approx(-math.log(1e-9), rel=1e-5)
    # d/dz of -log(1 - p) sums to p over the coordinates and to -p over the rest
    assert grad[0, IDS].sum().item() == pytest.approx(1.0, rel=1e-5)
    assert grad[0, others].sum().item() == pytest.approx(-1.0, rel=1e-5)


def test_gate_when_the_vocabulary_is_only_coordinates():
    value, grad = value_and_grad(lambda z: coord_gate(z, range(7)).sum, torch.randn(2, 7))
    assert value == 0
    assert grad.abs().max() == 0


@pytest.mark.parametrize("form", [list, tuple, torch.tensor, CoordColumns], ids=lambda form: form.__name__)
def test_scattered_ids_give_the_same_as_consecutive_ones(form):
    """Permuting the vocabulary together with the ids changes nothing, in any form of the ids."""
    logits = slot_logits("random", 4, V)
    order = torch.randperm(V, generator=torch.Generator().manual_seed(1))
    place = torch.argsort(order)  # logits[:, order] puts column v at place[v]
    scattered = form(place[IDS].tolist())

    for atom in (coord_gate, text_gate):
        torch.testing.assert_close(atom(logits[:, order], scattered), atom(logits, IDS))
    bins = torch.tensor([0, 999, 17, 640])
    for name, value in coord_monitors(logits[:, order], bins, scattered).items():
        torch.testing.assert_close(value, coord_monitors(logits, bins, IDS)[name])


def test_columns_know_bins_of_token_ids():
    consecutive, scattered = CoordColumns(range(5, 9)), CoordColumns([8, 5, 7])
    ids = torch.tensor([-100, 0, 5, 6, 7, 8, 9, 4000])
    assert consecutive.bins(ids).tolist() == [-1, -1, 0, 1, 2, 3, -1, -1]
    assert scattered.bins(ids).tolist() == [-1, -1, 1, -1, 2, 0, -1, -1]


def test_there_may_be_no_coordinate_tokens():
    """Where answers write coordinates as numbers."""
    none = CoordColumns([])
    assert none.num_bins == 0
    assert none.bins(torch.tensor([0, 5])).tolist() == [-1, -1]
    assert none.take(torch.zeros(3, 7)).shape == (3, 0)


@pytest.mark.parametrize("ids", [[4], [4, 4], [-1, 3]])
def test_columns_refuse_impossible_ids(ids):
    with pytest.raises(ConfigError, match="at least 2 different ids"):
        CoordColumns(ids)


# --- hand-worked numbers and invariants ----------------------------------------------------------------


def test_w1_hand_worked():
    """All mass at bin 0, target at bin 2 of 3: two bins of work over K - 1 = 2 bins."""
    z = torch.tensor([[50.0, 0.0, 0.0]])
    assert coord_w1(z, torch.tensor([2]), sigma=1e-3).sum.item() == pytest.approx(1.0, abs=1e-6)
    assert coord_w1(z, torch.tensor([1]), sigma=1e-3).sum.item() == pytest.approx(0.5, abs=1e-6)


def test_expected_errors_hand_worked():
    """Mass 1/2 at bins 0 and 4 of 5, true bin 1: distances 1 and 3 bins of 4."""
    z = torch.tensor([[0.0, -1e4, -1e4, -1e4, 0.0]])
    bins = torch.tensor([1])
    assert coord_el1(z, bins).sum.item() == pytest.approx((0.25 + 0.75) / 2)
    # huber, delta 0.5: 0.25^2 / 1 and 0.75 - 0.25
    assert coord_ehuber(z, bins, delta=0.5).sum.item() == pytest.approx((0.0625 + 0.5) / 2)
    assert coord_entropy(z).sum.item() == pytest.approx(math.log(2))


def test_gaussian_targets_hand_worked():
    q = gaussian_targets(torch.tensor([0, 3]), num_bins=5, sigma=1.0, truncate=1)
    e = math.exp(-0.5)
    expected = [
        [1 / (1 + e), e / (1 + e), 0, 0, 0],
        [0, 0, e / (1 + 2 * e), 1 / (1 + 2 * e), e / (1 + 2 * e)],
    ]
    torch.testing.assert_close(q, torch.tensor(expected))
    torch.testing.assert_close(
        gaussian_targets(torch.tensor([2]), 5, truncate=0), F.one_hot(torch.tensor([2]), 5).float()
    )


@settings(max_examples=40, deadline=None)
@given(
    bin_=st.integers(0, 99),
    sigma=st.floats(0.3, 30),
    truncate=st.none() | st.integers(0, 20),
    temperature=st.floats(0.3, 3),
    seed=st.integers(0, 999),
)
def test_invariants_of_soft_losses(bin_, sigma, truncate, temperature, seed):
    z = torch.randn(1, 100, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 5
    bins = torch.tensor([bin_])
    q = gaussian_targets(bins, 100, sigma, truncate, dtype=torch.float64)
    args = {"sigma": sigma, "truncate": truncate}

    assert q.sum().item() == pytest.approx(1.0)
    assert q.argmax() == bin_
    assert 0 <= coord_w1(z, bins, **args, temperature=temperature).sum <= 1
    entropy_q = -(q[q > 0] * q[q > 0].log()).sum()
    assert coord_soft_ce(z, bins, **args, temperature=temperature).sum >= entropy_q - 1e-9
    # logits that are log q reach both minima
    perfect = q.clamp_min(1e-300).log() * temperature
    assert coord_soft_ce(perfect, bins, **args, temperature=temperature).sum.item() == pytest.approx(
        entropy_q.item()
    )
    assert coord_w1(perfect, bins, **args, temperature=temperature).sum.item() == pytest.approx(0, abs=1e-9)


def test_logits_of_minus_infinity_mean_no_probability():
    z = torch.full((1, K), -math.inf)
    z[0, 498:503] = 0.0
    value, grad = value_and_grad(
        lambda z: coord_soft_ce(z, torch.tensor([500]), sigma=0.1).sum + coord_entropy(z).sum, z
    )
    assert value.item() == pytest.approx(2 * math.log(5))
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda z, g: coord_el1(z, g, temperature=0.0),
        lambda z, g: coord_soft_ce(z, g, sigma=0.0),
        lambda z, g: coord_ehuber(z, g, delta=-1.0),
    ],
)
def test_impossible_settings_are_refused(call):
    with pytest.raises(ConfigError, match="> 0"):
        call(torch.zeros(1, K), torch.tensor([3]))


# --- monitors ------------------------------------------------------------------------------------------


def test_monitors_hand_worked():
    """Vocabulary of 8 with coordinates at 2..7 (K = 6). Probabilities are chosen, logits are their logs."""
    p = torch.tensor(
        [
            [0.10, 0.10, 0.40, 0.20, 0.10, 0.05, 0.04, 0.01],  # coordinates hold 0.8
            [0.00, 0.00, 0.10, 0.10, 0.10, 0.10, 0.10, 0.50],
        ]
    )
    logits = (p + 1e-30).log()
    monitors = coord_monitors(logits, torch.tensor([1, 0]), list(range(2, 8)))

    inside = p[:, 2:] / p[:, 2:].sum(1, keepdim=True)
    expected_bin = (inside * torch.arange(6)).sum(1)
    abs_err = (expected_bin - torch.tensor([1, 0])).abs()
    distance = torch.tensor([[1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]])
    assert monitors["p_gt_mean"].item() == pytest.approx((0.2 / 0.8 + 0.1) / 2)
    assert monitors["margin_mean"].item() == pytest.approx((math.log(0.4 / 0.2) + math.log(0.5 / 0.1)) / 2)
    assert monitors["expected_bin_mae"].item() == pytest.approx(abs_err.mean().item())
    assert monitors["w1_to_delta"].item() == pytest.approx((inside * distance).sum(1).mean().item())
    assert monitors["coord_vocab_mass"].item() == pytest.approx((0.8 + 1.0) / 2)
    low, high = sorted(abs_err.tolist())
    assert monitors["expected_bin_abs_err_p90"].item() == pytest.approx(low + 0.9 * (high - low))


def test_acc_top5_counts_the_true_bin_among_the_five_likeliest():
    logits = torch.arange(V, dtype=torch.float32).repeat(4, 1)  # the last bins are the likeliest
    bins = torch.tensor([999, 995, 994, 0])
    assert coord_monitors(logits, bins, IDS)["acc_top5"].item() == pytest.approx(2 / 4)


def test_percentile_is_linearly_interpolated_like_numpy():
    logits, bins = slot_logits("random", 7, V), BINS
    p = logits[:, IDS].softmax(-1).double().numpy()
    abs_err = np.abs(p @ np.arange(K) - bins.numpy())
    ours = coord_monitors(logits, bins, IDS)["expected_bin_abs_err_p90"]
    assert ours.item() == pytest.approx(np.percentile(abs_err, 90), rel=1e-4)


def test_temperature_reaches_the_monitors():
    logits, bins = slot_logits("random", 7, V), BINS
    warm, scaled = coord_monitors(logits, bins, IDS, temperature=2.0), coord_monitors(logits / 2, bins, IDS)
    for name in warm:
        torch.testing.assert_close(warm[name], scaled[name])


def test_no_coordinate_rows_no_monitors():
    assert coord_monitors(torch.zeros(0, V), BINS[:0], IDS) == {}


def test_monitors_have_no_gradient():
    monitors = coord_monitors(torch.randn(2, V, requires_grad=True), BINS[:2], IDS)
    assert len(monitors) == 7
    assert not any(value.requires_grad for value in monitors.values())


@pytest.mark.parametrize(
    "atom",
    [
        lambda z, g: gaussian_targets(g, K),
        lambda z, g: coord_soft_ce(z, g, sigma=2.0),
        lambda z, g: coord_w1(z, g, sigma=2.0),
        coord_token_ce,
        coord_el1,
        lambda z, g: coord_ehuber(z, g, delta=0.1),
    ],
    ids=["gaussian_targets", "soft_ce", "w1", "token_ce", "el1", "ehuber"],
)
def test_bins_that_are_no_integers_are_refused(atom):
    logits = slot_logits("random", 2)
    with pytest.raises(ContractError, match=r"bins of dtype torch\.float32: expected integers"):
        atom(logits, torch.tensor([3.0, 4.5]))
    assert isinstance(atom(logits[:0], torch.tensor([])), Tensor | SumCount)  # nothing there, nothing wrong
