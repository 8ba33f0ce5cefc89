"""Finish a collated batch: find its supervised rows while the labels are still on the host.

The rows are plain tensors and ints under one key, so that data loaders can move them to the device, and the training
step never asks the device how many rows there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from coordexp.data.row_types import RowTyper, row_types
from coordexp.data.source import SampleSource
from coordexp.errors import ConfigError
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import SupervisedRows
from coordexp.packing.check import check_pack

ROWS_KEY = "coordexp_rows"

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


def with_supervised_rows(collate: Collate, columns: CoordColumns, typer: RowTyper | None = None) -> Collate:
    """`collate`, plus `batch[ROWS_KEY]`: supervised rows, and of which samples the batch is made.

    collate: takes encoded samples, or packs of them (lists), and returns a batch with `labels`.
    typer: also types the rows, for the token metrics. Rows of a batch whose labels are not those of its samples stay
    without types; see `token_types_skipped`.
    """

    def collate_with_rows(features: list[Any]) -> dict[str, Any]:
        samples = unpacked(features)
        sample_ids = tuple(SampleSource.of_sample(sample).sample_id for sample in samples)
        typed = None if typer is None else typer.labels_and_types(samples)
        batch = collate(features)
        if "labels" not in batch:
            raise ConfigError(
                f"the collated batch has no labels (keys: {', '.join(batch)}); is the template in train mode?"
            )
        check_pack(batch, len(samples))
        rows = SupervisedRows.from_labels(batch["labels"], columns)
        if typed is not None:
            rows = replace(rows, types_R=row_types(typed, batch["labels"], rows))
        batch[ROWS_KEY] = {
            "positions_R": rows.positions_R,
            "targets_R": rows.targets_R,
            "num_text": rows.num_text,
            "bins_N": rows.bins_N,
            "types_R": rows.types_R,
            "token_types_skipped": typed is not None and rows.types_R is None,
            "num_samples": len(samples),
            "sample_ids": sample_ids,
        }
        return batch

    return collate_with_rows


def unpacked(features: Sequence[Any]) -> list[dict[str, Any]]:
    """The encoded samples of a batch one by one, also where they come in packs."""
    packs = (feature if isinstance(feature, list) else [feature] for feature in features)
    return [sample for pack in packs for sample in pack]


def take_rows(batch: dict[str, Any]) -> tuple[SupervisedRows, int]:
    """Remove the rows from a batch (on any device): the rows, and the number of original samples."""
    packed = batch.pop(ROWS_KEY)
    rows = SupervisedRows(
        packed["positions_R"],
        packed["targets_R"],
        packed["num_text"],
        packed["bins_N"],
        types_R=packed["types_R"],
    )
    return rows, packed["num_samples"]


def sample_ids(batch: dict[str, Any]) -> tuple[str, ...]:
    """`FILE:LINE` of the samples a batch is made of, before its rows are taken."""
    return tuple(batch[ROWS_KEY]["sample_ids"])


def token_types_skipped(batch: dict[str, Any]) -> bool:
    """Whether the rows have no types because the batch's labels are not those of its samples, before they are taken."""
    return bool(batch[ROWS_KEY]["token_types_skipped"])
