"""Samples before anything is answered: a prompt and the objects that are really there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from coordexp.codec.schema import BoxObject
from coordexp.data.lengths import sample_lengths
from coordexp.data.shown import ShownRows
from coordexp.data.source import SampleSource, naming_sample
from coordexp.swift_bridge.draws import DrawnDataset
from coordexp.swift_bridge.prompts import encode_prompt
from coordexp.targets.sample import Media


@dataclass(frozen=True, eq=False)
class RawSample:
    """One question with its ground truth.

    prompt_ids: image placeholders expanded.  messages: up to the answer.  images: absolute paths.
    width, height: pixels of the first image.  dataset: see `codec.records.dataset_name`.
    part: the data set of a mixture that it was drawn from; empty without one.
    """

    sample_id: str
    dataset: str
    prompt_ids: tuple[int, ...]
    media: Media | None
    objects: tuple[BoxObject, ...]
    messages: tuple[dict[str, str], ...]
    images: tuple[str | bytes, ...]
    width: int
    height: int
    part: str = ""


class RawSamples(DrawnDataset):
    """Samples whose prompts are encoded when they are asked for (in data-loader workers).

    shown: rows with their pictures.  template: ms-swift's, in train mode.
    """

    def __init__(self, shown: ShownRows, template: Any) -> None:
        self._shown, self._template = shown, template

    def __len__(self) -> int:
        return len(self._shown)

    def lengths(self) -> list[int]:
        """Tokens of every sample of the first epoch, with its ground truth as answer."""
        all_rows = sample_lengths(self._shown.rows, self._template)
        lengths: list[int] = all_rows[self._shown.order.rows_in(0)].tolist()
        return lengths

    def __getitem__(self, index: int) -> RawSample:
        """Raises RecordError naming file and line of a sample whose prompt cannot be encoded."""
        shown = self._shown[index]
        record = shown.record
        with naming_sample(shown.row):
            prompt = encode_prompt(self._template, shown.row)
        media = None
        if prompt.pixel_values_PD is not None and prompt.image_grid_thw_I3 is not None:
            media = Media(prompt.pixel_values_PD, np.asarray(prompt.image_grid_thw_I3, dtype=np.int64))
        source = SampleSource.of_sample(shown.row)
        return RawSample(
            sample_id=source.sample_id,
            dataset=source.dataset,
            prompt_ids=prompt.token_ids,
            media=media,
            objects=record.objects,
            messages=tuple(dict(message) for message in shown.row["messages"][:-1]),
            images=shown.images,
            width=record.width,
            height=record.height,
            part=source.part,
        )
