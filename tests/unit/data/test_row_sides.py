"""Sides of the boxes that coordinate rows of stage 1 belong to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coordexp.codec.schema import BoxObject
from coordexp.data.batch_meta import BatchMeta
from coordexp.data.collator import with_meta
from coordexp.data.row_types import SIDES, coord_sides
from coordexp.data.source import SOURCE_COLUMN, SampleSource
from coordexp.errors import RecordError
from coordexp.losses.columns import CoordColumns

COLUMNS = CoordColumns(range(100, 1100))
BOX = BoxObject("cat", "bbox_2d", (10, 20, 40, 90))
POLYGON = BoxObject("leaf", "poly", (1, 2, 3, 4, 5, 6))


def test_a_box_has_its_width_and_height_twice_and_a_polygon_none() -> None:
    assert coord_sides([BOX, POLYGON]) == [30.0, 70.0, 30.0, 70.0, *[0.0] * 6]
    assert coord_sides([]) == []


def padded(samples: list[dict[str, Any]]) -> dict[str, Any]:
    longest = max(len(sample["labels"]) for sample in samples)
    labels = [sample["labels"] + [-100] * (longest - len(sample["labels"])) for sample in samples]
    return {"labels": torch.tensor(labels), "attention_mask": torch.ones(len(labels), longest)}


def encoded(objects: list[BoxObject], labels: list[int], line: int) -> dict[str, Any]:
    source = SampleSource("few", f"few.jsonl:{line}").to_text()
    return {"labels": labels, SIDES: coord_sides(objects), SOURCE_COLUMN: source}


def test_rows_of_a_batch_carry_the_sides_of_their_samples_in_order() -> None:
    first = encoded([BOX], [-100, 7, *(100 + bin_ for bin_ in BOX.bins), 8], 1)
    second = encoded([POLYGON, BOX], [-100, 7, *(100 + bin_ for bin_ in POLYGON.bins + BOX.bins), 8], 2)
    rows = BatchMeta.of(with_meta(padded, COLUMNS, has_sides=True)([first, second])).rows
    assert rows.bins_N.tolist() == [*BOX.bins, *POLYGON.bins, *BOX.bins]
    assert rows.sides_N is not None
    assert rows.sides_N.tolist() == [30, 70, 30, 70, *[0] * 6, 30, 70, 30, 70]
    assert BatchMeta.of(with_meta(padded, COLUMNS)([first, second])).rows.sides_N is None


def test_labels_with_other_coordinates_than_the_objects_are_named() -> None:
    cut = encoded([BOX], [-100, 7, 110, 120], 3)
    with pytest.raises(RecordError, match=r"few\.jsonl:3: .*the objects have 4 coordinates and the labels 2"):
        with_meta(padded, COLUMNS, has_sides=True)([cut])
