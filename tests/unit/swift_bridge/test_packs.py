"""Packs of samples that differ from epoch to epoch: as many as in the first epoch, none too long."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from coordexp.errors import ConfigError
from coordexp.swift_bridge.draws import Draw, DrawnDataset
from coordexp.swift_bridge.packing import DrawnPacks, as_many, pack_dataset

ARGUMENTS = {"packing_strategy": "binpack", "strict": True}


class Changing(DrawnDataset):
    """60 samples of other lengths in every epoch; a sample is (epoch, index)."""

    def lengths_in(self, epoch: int) -> Sequence[int]:
        return [int(n) for n in np.random.default_rng(epoch).integers(20, 90, 60)]

    @property
    def longest(self) -> int:
        return 90

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: Any) -> Any:
        if index == "lengths":
            return self.lengths_in(0)
        return Draw.of(index).epoch, int(index)


def packed(length: int) -> DrawnPacks:
    return pack_dataset(Changing(), SimpleNamespace(), length, ARGUMENTS)


def test_every_epoch_is_packed_for_itself():
    packs = packed(100)
    for epoch in (0, 1, 2, 1):
        lengths = packs.dataset.lengths_in(epoch)
        found = [packs[Draw(index, epoch)] for index in range(len(packs))]
        samples = [index for pack in found for _, index in pack]
        assert all(drawn == epoch for pack in found for drawn, _ in pack)
        assert max(sum(lengths[index] for _, index in pack) for pack in found) <= 100
        # A pack more or less than in the first epoch is evened out: some samples are missing, or come again.
        own = {index for pack in packs._lay_out(lengths) for index in pack}
        assert set(samples) == own
        assert len(own) >= 50
    assert [len(pack) for pack in packs.packs_in(1)] != [len(pack) for pack in packs.packs_in(2)]


def test_a_pack_more_or_less_is_evened_out():
    packs = [[(0, 90)], [(1, 20)], [(2, 50), (3, 30)], [(4, 10)]]
    assert as_many(packs, 4) == packs
    assert as_many(packs, 2) == [packs[0], packs[2]]
    assert as_many(packs, 6) == [*packs, packs[0], packs[1]]


def test_a_sample_of_a_later_epoch_that_is_too_long_is_told_at_once():
    with pytest.raises(ConfigError, match="packing_length 89: a sample has 90 tokens"):
        packed(89)
