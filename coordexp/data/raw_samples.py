"""Samples before anything is answered: a prompt and the objects that are really there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from coordexp.codec.schema import BoxObject
from coordexp.data.dataset import images_of, record_in
from coordexp.data.source import SampleSource, naming_sample
from coordexp.swift_bridge.prompts import encode_prompt
from coordexp.targets.sample import Media


@dataclass(frozen=True, eq=False)
class RawSample:
    """One question with its ground truth.

    prompt_ids: image placeholders expanded.  messages: up to the answer.  images: absolute paths.
    width, height: pixels of the first image.  dataset: see `codec.records.dataset_name`.
    """

    sample_id: str
    dataset: str
    prompt_ids: tuple[int, ...]
    media: Media | None
    objects: tuple[BoxObject, ...]
    messages: tuple[dict[str, str], ...]
    images: tuple[str, ...]
    width: int
    height: int


class RawSamples(Dataset[RawSample]):
    """Rows of `data.dataset.RowMaker`, their prompts encoded when asked for (in data-loader workers).

    template: ms-swift's, in train mode.
    multiple_of: the length is filled up to a multiple of this with the first rows, so that every optimizer step of an
        epoch gets the same number of samples and none is left out.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], template: Any, *, multiple_of: int = 1) -> None:
        self._rows, self._template = rows, template
        self._length = -(-len(rows) // multiple_of) * multiple_of

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> RawSample:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        row = self._rows[index % len(self._rows)]
        record = record_in(row)
        with naming_sample(row):
            prompt = encode_prompt(self._template, row)
        media = None
        if prompt.pixel_values_PD is not None and prompt.image_grid_thw_I3 is not None:
            media = Media(prompt.pixel_values_PD, np.asarray(prompt.image_grid_thw_I3, dtype=np.int64))
        source = SampleSource.of_sample(row)
        return RawSample(
            sample_id=source.sample_id,
            dataset=source.dataset,
            prompt_ids=prompt.token_ids,
            media=media,
            objects=record.objects,
            messages=tuple(dict(message) for message in row["messages"][:-1]),
            images=images_of(row),
            width=record.width,
            height=record.height,
        )
