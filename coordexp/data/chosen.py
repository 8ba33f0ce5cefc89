"""Some samples of a data set, in a given order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from coordexp.swift_bridge.draws import Draw, DrawnDataset


class ChosenSamples(DrawnDataset):
    """The samples of `dataset` with these indices.

    lengths: of all samples of `dataset`, in tokens; None where nobody asks for them.
    """

    def __init__(self, dataset: Any, indices: Sequence[int], lengths: Sequence[int] | None = None) -> None:
        self._dataset, self._indices, self._lengths = dataset, list(indices), lengths

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int | Literal["lengths"]) -> Any:
        """A sample; under "lengths" the tokens of all that were chosen."""
        if index == "lengths":
            assert self._lengths is not None
            return [int(self._lengths[chosen]) for chosen in self._indices]
        draw = Draw.of(index)
        return self._dataset[draw.moved(self._indices[draw])]
