"""Coordinates read from their distribution: bins against their definitions, rows that mean one and rows that do not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.losses.columns import CoordColumns
from coordexp.rollout.decoding import read_coords, readout
from coordexp.rollout.decoding.readout import CoordReadout, force_readout

IDS = [7, 3, 5, 4, 9]  # tokens of bins 0..4, in no order
VOCAB = 12


def logits_of(*rows):
    return torch.tensor(rows, dtype=torch.float64).clamp(min=1e-30).log().float()


def test_the_three_statistics_by_hand():
    # mode 4; half is reached at 2; mean 0.3 * 0 + 0.3 * 2 + 0.4 * 4 = 2.2
    lumps = [0.3, 0.0, 0.3, 0.0, 0.4]
    # mode 0; half is reached at 0; mean 0.6 * 0 + 0.4 * 4 = 1.6, rounded to 2
    two = [0.6, 0.0, 0.0, 0.0, 0.4]
    logits = logits_of(lumps, two)
    assert read_coords(logits, "argmax").tolist() == [4, 0]
    assert read_coords(logits, "median").tolist() == [2, 0]
    assert read_coords(logits, "expectation").tolist() == [2, 2]
    with pytest.raises(ValueError, match="expected argmax, median or expectation"):
        read_coords(logits, "mode")


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.1, 1.0, 10.0]), shift=st.floats(-50, 50))
def test_the_median_has_the_least_expected_distance(seed, scale, shift):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 1000, generator=generator) * scale
    probs = logits.double().softmax(-1)
    bins = torch.arange(1000, dtype=torch.float64)
    distances = probs @ (bins[:, None] - bins[None, :]).abs()  # [3, K]: of every candidate bin
    squares = probs @ (bins[:, None] - bins[None, :]) ** 2
    chosen = read_coords(logits + shift, "median")
    assert chosen.dtype == torch.int64
    picked = distances.gather(1, chosen[:, None]).squeeze(1)
    torch.testing.assert_close(picked, distances.min(dim=1).values, rtol=1e-6, atol=1e-4)
    mean = read_coords(logits + shift, "expectation")
    picked = squares.gather(1, mean[:, None]).squeeze(1)
    torch.testing.assert_close(picked, squares.min(dim=1).values, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("bin_index", [0, 499, 999])
def test_a_sure_distribution_is_read_alike(bin_index):
    logits = torch.full((1, 1000), -40.0)
    logits[0, bin_index] = 0.0
    assert {read_coords(logits, how).item() for how in ("argmax", "median", "expectation")} == {bin_index}


def scores():
    """Rows: a coordinate with lumps at bins 0, 2, 4; text; a coordinate whose mass is just under one half."""
    probs = torch.zeros(3, VOCAB, dtype=torch.float64)
    probs[0, [7, 5, 9]] = torch.tensor([0.3, 0.25, 0.35], dtype=torch.float64)
    probs[0, 1] = 0.1
    probs[1, 1], probs[1, 7] = 0.9, 0.1
    probs[2, [7, 9]] = torch.tensor([0.24, 0.25], dtype=torch.float64)
    probs[2, 2], probs[2, 1] = 0.2, 0.31
    return probs.clamp(min=1e-30).log().float() + torch.tensor([[3.0], [-2.0], [0.5]])


def test_only_rows_that_mean_a_coordinate_are_forced():
    before = scores()
    after = force_readout(scores(), CoordColumns(IDS), "median")
    assert after[0].argmax().item() == 5  # bin 2, where the mode is bin 4
    assert torch.isinf(after[0]).sum().item() == VOCAB - 1
    assert after[0, 5].item() == 0.0
    torch.testing.assert_close(after[1:], before[1:], rtol=0, atol=0)
    assert after[2].argmax().item() == 1


def test_the_processor_of_generate_does_the_same():
    processor = CoordReadout("expectation", IDS)
    out = processor(torch.zeros(3, 4, dtype=torch.long), scores())
    # mean of row 0: (0.25 * 2 + 0.35 * 4) / 0.9 = 2.11
    assert out.argmax(dim=1).tolist() == [5, 1, 1]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    first=st.sampled_from([0, 11, 30]),
    shift=st.floats(-3, 12),
    scale=st.sampled_from([0.1, 1.0, 4.0]),
    how=st.sampled_from(["argmax", "median", "expectation"]),
)
def test_rows_are_forced_by_their_mass_in_double_precision(seed, first, shift, scale, how):
    """Against the definition, row by row: all kinds of rows, coordinates at any place of the vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        for small in (readout.SMALL, 0):
            patch.setattr(readout, "SMALL", small)
            check_rows(seed, first, shift, scale, how)


def check_rows(seed, first, shift, scale, how):
    generator = torch.Generator().manual_seed(seed)
    ids = list(range(first, first + 50))
    before = torch.randn(24, 80, generator=generator) * scale
    before[:, ids] += shift * torch.rand(24, 1, generator=generator)
    before[::5, (first + 60) % 80] += 9.0  # one other token may outweigh all of them
    after = force_readout(before.clone(), CoordColumns(ids), how)
    alone = force_readout(before[:, ids].contiguous(), CoordColumns(range(50)), how)
    assert torch.equal(alone.isfinite().sum(dim=1), torch.ones(24, dtype=torch.int64))  # all mass is theirs
    masked = readout.force_masked(before.clone(), CoordColumns(ids), how)
    assert torch.equal(masked, after)  # what an accelerator does
    masses = before.double().softmax(dim=-1)[:, ids].sum(dim=-1).tolist()
    for row, mass in enumerate(masses):
        if mass > 0.5:
            wanted = ids[read_coords(before[row : row + 1, ids], how).item()]
            assert after[row].isfinite().nonzero().flatten().tolist() == [wanted]
        else:
            assert torch.equal(after[row], before[row])
