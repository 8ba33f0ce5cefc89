"""Finish a collated batch: find its supervised rows while the labels are still on the host.

So the training step never asks the device how many rows there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

from coordexp.data.batch_meta import BatchMeta
from coordexp.data.row_types import RowTyper, row_parts, row_sides, row_types
from coordexp.data.source import SampleSource
from coordexp.errors import ConfigError
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import SupervisedRows
from coordexp.packing.isolation import check_pack

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


def with_meta(
    collate: Collate,
    columns: CoordColumns,
    typer: RowTyper | None = None,
    parts: tuple[str, ...] = (),
    *,
    has_sides: bool = False,
) -> Collate:
    """`collate`, plus the `BatchMeta` of the batch.

    collate: takes encoded samples, or packs of them (lists), and returns a batch with `labels`.
    typer: also types the rows, for the token metrics. Rows of a batch whose labels are not those of its samples stay
    without types (`types_skipped`).
    parts: names of the data sets of a mixture; rows then tell theirs.
    has_sides: coordinate rows tell the sides of their boxes.
    """
    return partial(
        _collate_with_meta, collate=collate, columns=columns, typer=typer, parts=parts, has_sides=has_sides
    )


def _collate_with_meta(
    features: list[Any],
    *,
    collate: Collate,
    columns: CoordColumns,
    typer: RowTyper | None,
    parts: tuple[str, ...],
    has_sides: bool,
) -> dict[str, Any]:
    """A function of the module, so that spawned workers can be given it."""
    samples = unpacked(features)
    sources = [SampleSource.of_sample(sample) for sample in samples]
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
    if parts:
        rows = replace(rows, parts_R=row_parts(samples, parts, batch["labels"], rows), num_parts=len(parts))
    if has_sides:
        rows = replace(rows, sides_N=row_sides(samples, rows))
    BatchMeta(
        rows,
        tuple(source.sample_id for source in sources),
        len(samples),
        types_skipped=typed is not None and rows.types_R is None,
        num_replaced=sum(source.in_place_of is not None for source in sources),
        parts=tuple(source.part for source in sources),
        num_images=len(batch.get("image_grid_thw", ())),
        num_tokens=int(batch["attention_mask"].sum() if _is_padded(batch) else batch["labels"].numel()),
        num_places=batch["labels"].numel(),
        num_packs=sum(isinstance(feature, list) for feature in features),
        ends=_ends(features, batch["labels"].shape),
    ).put(batch)
    return batch


def _ends(features: Sequence[Any], shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """`BatchMeta.ends` of labels [B, T]: an entry is a row of its own, or they follow one another in a single row."""
    packs = [unpacked([feature]) for feature in features]
    num_samples = accumulate(len(pack) for pack in packs)
    if shape[0] == len(features):
        places: Iterable[int] = range(shape[1], shape[0] * shape[1] + 1, shape[1])
    else:
        places = accumulate(sum(len(sample["labels"]) for sample in pack) for pack in packs)
    return tuple(zip(places, num_samples, strict=True))


def _is_padded(batch: dict[str, Any]) -> bool:
    """Whether the batch has a mask that tells padding; a pack has none, or one that keeps its samples apart."""
    mask = batch.get("attention_mask")
    return mask is not None and mask.ndim == 2


def unpacked(features: Sequence[Any]) -> list[dict[str, Any]]:
    """The encoded samples of a batch one by one, also where they come in packs."""
    packs = (feature if isinstance(feature, list) else [feature] for feature in features)
    return [sample for pack in packs for sample in pack]
