"""Coordinates read from their distribution while decoding, on a device, against numpy in float64. 5 s on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.gpu import Say
from torch import Tensor

from coordexp.losses.columns import CoordColumns
from coordexp.rollout.decoding.distributions import distribution_of, summarise
from coordexp.rollout.decoding.readout import CoordReadout

pytestmark = pytest.mark.gpu

SIZES = {"cuda": (256, 152_704), "cpu": (32, 2500)}
NUM_BINS = 1000


def scores_of(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, CoordColumns]:
    """Rows that mean a coordinate, with two lumps each, and rows that mean text, in turn."""
    rows, vocab = SIZES[device.type]
    g = torch.Generator().manual_seed(0)
    scores_BV = torch.randn(rows, vocab, generator=g)
    columns = CoordColumns(range(vocab - NUM_BINS - 35, vocab - 35))
    bins_K = torch.arange(NUM_BINS)
    for row in range(0, rows, 2):
        centres = torch.randint(0, NUM_BINS, (2,), generator=g)
        lumps_K = -((bins_K - centres[:, None]) ** 2 / 200.0).amin(0)
        scores_BV[row, vocab - NUM_BINS - 35 : vocab - 35] += 25.0 + lumps_K.clamp(min=-20.0)
    return scores_BV.to(device, dtype), columns


def expected_bins(scores_BV: Tensor, columns: CoordColumns) -> dict[str, np.ndarray]:
    """By the definitions, in float64; -1 for rows whose coordinate tokens hold no more than half of the mass."""
    values = scores_BV.cpu().double().numpy()
    probs = np.exp(values - values.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    coord = probs[:, columns.ids[0] : columns.ids[-1] + 1]
    mass = coord.sum(axis=1)
    coord = coord / mass[:, None]
    means = mass > 0.5
    median = [int(np.searchsorted(np.cumsum(row), 0.5)) for row in coord]
    mean = np.rint(coord @ np.arange(NUM_BINS))
    return {"median": np.where(means, median, -1), "expectation": np.where(means, mean, -1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("how", ["median", "expectation"])
def test_the_processor_writes_the_bins_of_float64(
    device: torch.device, how: str, dtype: torch.dtype, say: Say
):
    scores_BV, columns = scores_of(device, dtype)
    expected_B = torch.from_numpy(expected_bins(scores_BV, columns)[how].astype(np.int64))
    before_BV = scores_BV.clone()
    after_BV = CoordReadout(how, columns.ids)(torch.zeros(1, 1, device=device), scores_BV)
    is_coord_B = expected_B >= 0
    found_B = after_BV.argmax(-1).cpu() - columns.ids[0]
    equal = int((found_B == expected_B)[is_coord_B].sum())
    mode_B = before_BV.argmax(-1).cpu() - columns.ids[0]
    say(
        f"{how}, {dtype}: {equal} of {int(is_coord_B.sum())} coordinates are those of float64 "
        f"({int((mode_B == expected_B)[is_coord_B].sum())} are the most likely one); "
        f"{int((~is_coord_B).sum())} rows of text unchanged"
    )
    assert is_coord_B.sum() == len(is_coord_B) // 2
    assert torch.equal(found_B[is_coord_B], expected_B[is_coord_B])
    assert torch.equal(after_BV[~is_coord_B.to(device)], before_BV[~is_coord_B.to(device)])
    forced_BV = after_BV[is_coord_B.to(device)]
    assert bool((forced_BV.isinf().sum(-1) == forced_BV.shape[1] - 1).all())


def test_kept_distributions_have_the_mean_of_the_whole(device: torch.device, say: Say):
    scores_BV, columns = scores_of(device, torch.float32)
    kept = summarise(scores_BV, columns.index(device)).tolist()
    probs_BK = columns.take(scores_BV).cpu().double().softmax(-1)
    mass_B = columns.take(scores_BV.cpu().double().softmax(-1)).sum(-1)
    mean_B = probs_BK @ torch.arange(NUM_BINS, dtype=torch.float64)
    gaps = []
    for row in range(0, len(kept), 2):
        found = distribution_of(kept[row])
        assert found.mass == pytest.approx(mass_B[row].item(), abs=1e-5)
        weights = np.array(found.weights) / np.sum(found.weights)
        gaps.append(abs(float(weights @ np.array(found.bins)) - mean_B[row].item()))
    say(f"{len(gaps)} kept distributions: mass within 1e-5, mean within {max(gaps):.2f} bins of the CPU's")
    assert max(gaps) < 4.0  # of a summary by 64 atoms
