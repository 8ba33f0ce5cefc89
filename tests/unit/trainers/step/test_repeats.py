"""Which samples of an evaluation's batches count, against the batches that accelerate makes for the ranks."""

from __future__ import annotations

import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, SequentialSampler

from coordexp.trainers.step.repeats import counted_of_last_round


def batches(num_samples: int, size: int, rank: int, num_ranks: int) -> list[list[int]]:
    """As accelerate gives them to a rank."""
    whole = BatchSampler(SequentialSampler(range(num_samples)), size, drop_last=False)
    return [list(batch) for batch in BatchSamplerShard(whole, num_ranks, rank)]


def test_four_samples_in_batches_of_three_on_two_ranks():
    assert batches(4, 3, 0, 2) == [[0, 1, 2]]
    assert batches(4, 3, 1, 2) == [[3, 0, 1]]
    assert [counted_of_last_round(4, rank, 3) for rank in (0, 1)] == [3, 1]


@pytest.mark.parametrize(
    ("remainder", "counted"), [(1, [1, 0, 0]), (2, [2, 0, 0]), (3, [2, 1, 0]), (5, [2, 2, 1])]
)
def test_ranks_take_the_last_round_in_order(remainder: int, counted: list[int]):
    assert [counted_of_last_round(remainder, rank, 2) for rank in range(3)] == counted


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 5))
def test_every_sample_counts_once(num_samples: int, size: int, num_ranks: int):
    counted = []
    for rank in range(num_ranks):
        *full, last = batches(num_samples, size, rank, num_ranks)
        remainder = num_samples % (size * num_ranks)  # as accelerate's data loader says
        number = counted_of_last_round(remainder, rank, len(last)) if remainder else len(last)
        counted += [index for batch in full for index in batch] + last[:number]
    assert sorted(counted) == list(range(num_samples))
