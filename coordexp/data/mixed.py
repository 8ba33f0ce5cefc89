"""Rows of several data sets in one run, each with its share (`custom.fusion`).

    mixed = open_mixed({"coco": ["coco.jsonl"], "lvis": [...]}, maker)     # one table, data set after data set
    order = MixedOrder.of(mixed, weights, ...)                             # which row the n-th sample of the run is

The n-th sample is a pure function of seed and n: `control.mixing` says from which data set it comes and how many of it
came before, and each data set is gone through in a new shuffled order at every pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from datasets import Dataset, concatenate_datasets

from coordexp.control.mixing import MixSchedule
from coordexp.data.dataset import RowMaker
from coordexp.data.store.open import open_records
from coordexp.swift_bridge.draws import Draw


@dataclass(frozen=True, eq=False)
class Mixed:
    """rows: of all data sets, one after another.  names, sizes: of the data sets, in that order."""

    rows: Dataset
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """The first row of each data set."""
        return np.cumsum([0, *self.sizes[:-1]])

    def name_of(self, row: int) -> str:
        """The data set that a row belongs to."""
        return self.names[int(np.searchsorted(self.starts, row, side="right")) - 1]


def open_mixed(files: Mapping[str, Sequence[str]], maker: RowMaker, limit: int | None = None) -> Mixed:
    """The rows of data sets given by their files.

    limit: rows of each data set at most, from its beginning.
    Raises RecordError as `open_records`.
    """
    tables = {
        name: concatenate_datasets([open_records(file).table for file in files[name]]) for name in files
    }
    if limit is not None:
        tables = {name: table.select(range(min(limit, len(table)))) for name, table in tables.items()}
    rows = concatenate_datasets(list(tables.values())).with_transform(maker)
    return Mixed(rows, tuple(tables), tuple(map(len, tables.values())))


@dataclass(frozen=True, eq=False)
class MixedOrder:
    """Which row of `Mixed` a draw shows.

    length: samples of an epoch.  seed: of the shuffled orders.  shuffled: False takes every pass in the files' order.
    """

    schedule: MixSchedule
    mixed: Mixed
    length: int
    seed: int
    shuffled: bool = True
    differs_by_epoch: ClassVar[bool] = True

    @classmethod
    def of(
        cls,
        mixed: Mixed,
        weights: Sequence[float],
        *,
        seed: int,
        stopping_strategy: str,
        samples_per_epoch: int | None,
        multiple_of: int = 1,
        shuffled: bool = True,
    ) -> MixedOrder:
        """stopping_strategy, samples_per_epoch: see `custom.fusion`.

        multiple_of: the epoch is made a multiple of this, by samples that come next.
        """
        schedule = MixSchedule.of(weights)
        ends = [schedule.length_until(which, size) for which, size in enumerate(mixed.sizes)]
        asked_for = samples_per_epoch or (min(ends) if stopping_strategy == "first_exhausted" else max(ends))
        length = -(-asked_for // multiple_of) * multiple_of
        return cls(schedule, mixed, length, seed, shuffled)

    def __len__(self) -> int:
        return self.length

    def rows_in(self, epoch: int) -> npt.NDArray[np.int64]:
        """int64 [len]: the row of every index in an epoch."""
        rounds, places = np.divmod(
            np.arange(epoch * self.length, (epoch + 1) * self.length), self.schedule.round_length
        )
        which = self.schedule.which_L[places]
        before = rounds * np.array(self.schedule.parts)[which] + self.schedule.before_L[places]
        passes, within = np.divmod(before, np.array(self.mixed.sizes)[which])
        if self.shuffled:
            for of_set in range(len(self.mixed.sizes)):
                own = np.flatnonzero(which == of_set)
                first_of_passes = np.flatnonzero(np.diff(passes[own], prepend=-1))
                for here in np.split(own, first_of_passes[1:]) if len(own) else ():
                    within[here] = self._pass(of_set, int(passes[here[0]]))[within[here]]
        rows: npt.NDArray[np.int64] = self.mixed.starts[which] + within
        return rows

    def at(self, draw: Draw) -> tuple[int, str]:
        """The row, and a name for the turn at which it is shown."""
        which, before = self.schedule.at(draw.epoch * self.length + int(draw))
        passes, place = divmod(before, self.mixed.sizes[which])
        if self.shuffled:
            place = int(self._pass(which, passes)[place])
        return int(self.mixed.starts[which]) + place, f"{draw.epoch}.{passes}"

    def _pass(self, which: int, number: int) -> npt.NDArray[np.int32]:
        """The order in which a data set is shown at a pass through it."""
        return _shuffled(self.mixed.sizes[which], f"{self.seed} {self.mixed.names[which]} {number}")


@lru_cache(maxsize=32)
def _shuffled(size: int, seed: str) -> npt.NDArray[np.int32]:
    """The numbers below `size` in a random order, the same for the same seed."""
    digest = hashlib.sha256(seed.encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big")).permutation(size).astype(np.int32)
