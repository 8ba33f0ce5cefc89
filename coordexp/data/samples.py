"""Training samples of stage 1: rows, encoded by the template when they are asked for (in data-loader workers)."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, Literal

from torch.utils.data import Dataset

from coordexp.data.lengths import sample_lengths
from coordexp.data.source import SOURCE_COLUMN, SampleSource, naming_sample
from coordexp.errors import RecordError
from coordexp.swift_bridge.prompts import encode_sample

MAX_TRIES = 10
"""Samples that are tried in place of one that cannot be encoded."""


class EncodedSamples(Dataset[dict[str, Any]]):
    """Rows as the template encodes them.

    rows: of `data.dataset.RowMaker`.  template: ms-swift's, in train mode.
    strict: a row that cannot be encoded is an error. False: another one takes its place, the same in every run with
        this `seed`; the sample's source names what it stands for, so that it can be counted.
    """

    def __init__(self, rows: Any, template: Any, *, strict: bool = True, seed: int = 0) -> None:
        self._rows, self._template = rows, template
        self._strict, self._seed = strict, seed

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | Literal["lengths"]) -> Any:
        """An encoded sample; under "lengths", where packers and samplers ask for them, the tokens of all samples.

        Raises RecordError naming file and line of a row that cannot be encoded, and what to do.
        """
        if index == "lengths":
            return sample_lengths(self._rows, self._template).tolist()
        try:
            return self._encoded(index)
        except RecordError as error:
            if self._strict:
                raise
            return self._another(index, error)

    def _encoded(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        with naming_sample(row):
            return encode_sample(self._template, row)

    def _another(self, index: int, first_error: RecordError) -> dict[str, Any]:
        """The first sample that can be encoded of a few drawn for this index."""
        draws = random.Random(f"{self._seed} {index}")
        for _ in range(MAX_TRIES):
            other = draws.randrange(len(self._rows))
            try:
                sample = self._encoded(other)
            except RecordError:
                continue
            source = replace(
                SampleSource.of_sample(self._rows[other]),
                in_place_of=SampleSource.of_sample(self._rows[index]).sample_id,
            )
            return {**sample, SOURCE_COLUMN: source.to_text()}
        raise RecordError(
            f"strict: false replaces a sample that cannot be encoded by another, but {MAX_TRIES} drawn for one could "
            f"not be encoded either. The first: {first_error}"
        ) from first_error
