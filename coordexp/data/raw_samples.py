"""Samples before anything is answered: a prompt and the objects that are really there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from coordexp.codec.records import Record, order_objects
from coordexp.codec.schema import BoxObject
from coordexp.data.dataset import read_rows, training_row
from coordexp.data.source import naming_sample, source_of
from coordexp.swift_bridge.prompts import encode_prompt
from coordexp.targets.sample import Media

RAW_COLUMN = "coordexp_raw"


@dataclass(frozen=True, eq=False)
class RawSample:
    """One question with its ground truth.

    prompt_ids: image placeholders expanded.  messages: the user turn.  images: absolute paths.
    width, height: pixels of the first image.  dataset: see `data.source.dataset_name`.
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


def raw_row(record: Record, *, prompt: str, field_order: str, ordering: str, seed: int) -> dict[str, Any]:
    """A training row that also carries its objects, size and name, as JSON in one column."""
    row = training_row(record, prompt=prompt, field_order=field_order, ordering=ordering, seed=seed)
    objects = order_objects(record.objects, ordering, seed=seed * 1_000_003 + (record.line or 0))
    row[RAW_COLUMN] = json.dumps(
        {
            **asdict(source_of(record)),
            "objects": [[obj.desc, obj.kind, list(obj.bins)] for obj in objects],
            "width": record.width,
            "height": record.height,
        },
        ensure_ascii=False,
    )
    return row


def read_raw_rows(
    path: str | Path, *, prompt: str, field_order: str = "desc_first", ordering: str = "sorted", seed: int = 0
) -> list[dict[str, Any]]:
    """All rows of a JSONL file; errors as in `data.dataset.read_rows`."""
    return read_rows(
        path, partial(raw_row, prompt=prompt, field_order=field_order, ordering=ordering, seed=seed)
    )


class RawSamples(Dataset[RawSample]):
    """Rows of `read_raw_rows`, their prompts encoded when asked for (in data-loader workers).

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
        raw = json.loads(row[RAW_COLUMN])
        with naming_sample(row):
            prompt = encode_prompt(self._template, row)
        media = None
        if prompt.pixel_values_PD is not None and prompt.image_grid_thw_I3 is not None:
            media = Media(prompt.pixel_values_PD, np.asarray(prompt.image_grid_thw_I3, dtype=np.int64))
        return RawSample(
            sample_id=raw["sample_id"],
            dataset=raw["dataset"],
            prompt_ids=prompt.token_ids,
            media=media,
            objects=tuple(BoxObject(desc, kind, tuple(bins)) for desc, kind, bins in raw["objects"]),
            messages=tuple(dict(message) for message in row["messages"][:-1]),
            images=tuple(_path(image) for image in row["images"]),
            width=raw["width"],
            height=raw["height"],
        )


def _path(image: Any) -> str:
    """ms-swift may wrap an image path as {"bytes": None, "path": ...}."""
    return str(image["path"]) if isinstance(image, Mapping) else str(image)
