"""A collated batch with both forms of its prompts: the text, as without a latent prefix, and latent tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from coordexp.data.batch_meta import BatchMeta
from coordexp.data.collator import Collate
from coordexp.data.latent.spans import SPAN, texts_of_batch, with_latent_tokens
from coordexp.errors import ConfigError, ContractError
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import SupervisedRows
from coordexp.losses.latent.answers import answer_places

LATENT_KEY = "coordexp_latent"
"""Where a collated batch carries it."""
_MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
_BOOKKEEPING = ("channel",)


@dataclass(frozen=True, eq=False)
class LatentBatch:
    """What a forward with latent tokens needs beside the batch of the text.

    inputs: arguments of the model that differ from those of the text.
    positions_R: of the supervised rows, in the order of those of the text.
    places_R: see `answers.answer_places`.
    text_ids_SL, text_mask_SL: the prompts' texts.
    """

    inputs: dict[str, Any]
    positions_R: Tensor
    places_R: Tensor
    text_ids_SL: Tensor
    text_mask_SL: Tensor

    def put(self, batch: dict[str, Any]) -> None:
        """Into a batch, as a plain mapping, which data loaders move to the device."""
        batch[LATENT_KEY] = {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def take(cls, batch: dict[str, Any]) -> LatentBatch:
        """Out of a batch, on whatever device it is by now."""
        return cls(**batch.pop(LATENT_KEY))

    @classmethod
    def of(cls, batch: dict[str, Any]) -> LatentBatch:
        """That of a batch which keeps it."""
        return cls.take(dict(batch))

    def model_inputs(self, text_inputs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the model: those of the text with latent tokens in its place."""
        media = {key: text_inputs[key] for key in _MEDIA if key in text_inputs}
        return {**media, **self.inputs}

    def first(self, keep_R: Tensor) -> LatentBatch:
        """The same forward with some of its supervised rows, bool [R]."""
        return replace(self, positions_R=self.positions_R[keep_R], places_R=self.places_R[keep_R])

    def rows(self, text_rows: SupervisedRows) -> SupervisedRows:
        """The supervised rows, with all that is known of those of the text."""
        return replace(text_rows, positions_R=self.positions_R)


def with_latents(
    collate: Collate, plain: Collate, latent_ids: Sequence[int], opening: Sequence[int], columns: CoordColumns
) -> Collate:
    """`collate`, which makes the batch of the text with its `BatchMeta`, plus the `LatentBatch`.

    plain: what makes a batch without a `BatchMeta`.  opening: tokens that every answer begins with.
    """
    return partial(
        _collate_with_latents,
        collate=collate,
        plain=plain,
        latent_ids=tuple(latent_ids),
        opening=tuple(opening),
        columns=columns,
    )


def _collate_with_latents(
    features: list[Any],
    *,
    collate: Collate,
    plain: Collate,
    latent_ids: tuple[int, ...],
    opening: tuple[int, ...],
    columns: CoordColumns,
) -> dict[str, Any]:
    """A function of the module, so that spawned workers can be given it."""
    if any(isinstance(feature, list) for feature in features):
        raise ConfigError(
            "trainer variant latent_prefix does not train on packs; remove packing (and padding_free)."
        )
    batch = collate([without_span(feature) for feature in features])
    prompts = [latent_ids] * len(features)
    batch_of_prompts(features, prompts, plain, opening, columns, BatchMeta.of(batch).rows).put(batch)
    return batch


def without_span(sample: Mapping[str, Any]) -> dict[str, Any]:
    """An encoded sample as the template made it."""
    return {key: value for key, value in sample.items() if key != SPAN}


def batch_of_prompts(
    features: Sequence[Mapping[str, Any]],
    prompts: Sequence[Sequence[int]],
    plain: Collate,
    opening: Sequence[int],
    columns: CoordColumns,
    text_rows: SupervisedRows,
) -> LatentBatch:
    """Samples with other tokens in the place of their prompts' text: the i-th one with `prompts[i]`.

    text_rows: the supervised rows of the batch of the text, whose answers are the same.  Others: see `with_latents`.
    """
    other = plain([with_latent_tokens(feature, ids) for feature, ids in zip(features, prompts, strict=True)])
    labels_BT = other.pop("labels")
    rows = SupervisedRows.from_labels(labels_BT, columns)
    if not torch.equal(rows.targets_R, text_rows.targets_R):
        raise ContractError("a batch with latent tokens teaches other tokens than that of the text")
    inputs = {key: value for key, value in other.items() if key not in (*_MEDIA, *_BOOKKEEPING)}
    texts, mask = texts_of_batch(features)
    return LatentBatch(inputs, rows.positions_R, answer_places(labels_BT, rows, opening), texts, mask)
