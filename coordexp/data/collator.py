"""Finish a collated batch: find its supervised rows while the labels are still on the host.

The rows are plain tensors and ints under one key, so that data loaders can move them to the device, and the training
step never asks the device how many rows there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from coordexp.errors import ConfigError
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import SupervisedRows

ROWS_KEY = "coordexp_rows"

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


def with_supervised_rows(collate: Collate, columns: CoordColumns) -> Collate:
    """`collate`, plus `batch[ROWS_KEY]`: supervised rows, and `num_samples`, the original samples in the batch."""

    def collate_with_rows(features: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(features)
        if "labels" not in batch:
            raise ConfigError(
                f"the collated batch has no labels (keys: {', '.join(batch)}); is the template in train mode?"
            )
        rows = SupervisedRows.from_labels(batch["labels"], columns)
        batch[ROWS_KEY] = {
            "positions_R": rows.positions_R,
            "targets_R": rows.targets_R,
            "num_text": rows.num_text,
            "bins_N": rows.bins_N,
            "num_samples": len(features),
        }
        return batch

    return collate_with_rows


def take_rows(batch: dict[str, Any]) -> tuple[SupervisedRows, int]:
    """Remove the rows from a batch (on any device): the rows, and the number of original samples."""
    packed = batch.pop(ROWS_KEY)
    rows = SupervisedRows(packed["positions_R"], packed["targets_R"], packed["num_text"], packed["bins_N"])
    return rows, packed["num_samples"]
