"""Training samples of stage 1, encoded by the template when they are asked for (in data-loader workers)."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from coordexp.data.lengths import sample_lengths
from coordexp.data.row_types import SIDES, coord_sides
from coordexp.data.shown import ShownRows
from coordexp.data.source import SOURCE_COLUMN, SampleSource, naming_sample
from coordexp.errors import RecordError
from coordexp.swift_bridge.draws import Draw, DrawnDataset
from coordexp.swift_bridge.prompts import encode_sample

MarkSample = Callable[[Mapping[str, Any], dict[str, Any]], dict[str, Any]]
MAX_TRIES = 10
"""Samples that are tried in place of one that cannot be encoded."""


class EncodedSamples(DrawnDataset):
    """Samples as the template encodes them.

    shown: rows with their pictures.  template: ms-swift's, in train mode.
    also: adds to an encoded sample what is known from its row.
    strict: a sample that cannot be encoded is an error. False: another one takes its place, the same in every run with
        this `seed`; the sample's source names what it stands for, so that it can be counted.
    """

    def __init__(
        self,
        shown: ShownRows,
        template: Any,
        *,
        strict: bool = True,
        seed: int = 0,
        also: MarkSample | None = None,
    ) -> None:
        self._shown, self._template, self._also = shown, template, also
        self._strict, self._seed = strict, seed

    def __len__(self) -> int:
        return len(self._shown)

    def __getitem__(self, index: int | Literal["lengths"]) -> Any:
        """An encoded sample; under "lengths", where packers and samplers ask for them, the tokens of all samples.

        Raises RecordError naming file and line of a sample that cannot be encoded, and what to do.
        """
        if index == "lengths":
            return self._lengths(0)
        draw = Draw.of(index)
        try:
            return self._encoded(draw)
        except RecordError as error:
            if self._strict:
                raise
            return self._another(draw, error)

    def row_at(self, index: int) -> Mapping[str, Any]:
        """The row behind an index, without its picture."""
        return self._shown.row_at(index)

    def lengths_in(self, epoch: int) -> list[int] | None:
        return self._lengths(epoch) if self._shown.order.differs_by_epoch else None

    @property
    def longest(self) -> int | None:
        if not self._shown.order.differs_by_epoch:
            return None
        return int(sample_lengths(self._shown.rows, self._template).max())

    def _lengths(self, epoch: int) -> list[int]:
        lengths: list[int] = sample_lengths(self._shown.rows, self._template)[
            self._shown.order.rows_in(epoch)
        ].tolist()
        return lengths

    def _encoded(self, draw: Draw) -> dict[str, Any]:
        shown = self._shown[draw]
        with naming_sample(shown.row):
            sample = {**encode_sample(self._template, shown.row), SIDES: coord_sides(shown.record.objects)}
            return sample if self._also is None else self._also(shown.row, sample)

    def _another(self, draw: Draw, first_error: RecordError) -> dict[str, Any]:
        """The first sample that can be encoded of a few drawn for this index."""
        draws = random.Random(f"{self._seed} {int(draw)}")
        for _ in range(MAX_TRIES):
            other = draw.moved(draws.randrange(len(self)))
            try:
                sample = self._encoded(other)
            except RecordError:
                continue
            source = replace(
                SampleSource.of_sample(self._shown.row_at(other)),
                in_place_of=SampleSource.of_sample(self._shown.row_at(draw)).sample_id,
            )
            return {**sample, SOURCE_COLUMN: source.to_text()}
        raise RecordError(
            f"strict: false replaces a sample that cannot be encoded by another, but {MAX_TRIES} drawn for one could "
            f"not be encoded either. The first: {first_error}"
        ) from first_error
