"""Token types and data sets of the supervised rows of a batch, told per sample before anything is padded or packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coordexp.codec.coord_vocab import Tokenizer
from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.forms.choose import form_of
from coordexp.codec.schema import KIND_BBOX, BoxObject
from coordexp.codec.token_types import TokenType
from coordexp.data.source import DatasetFilter, SampleSource
from coordexp.errors import RecordError
from coordexp.losses.inputs import IGNORE_INDEX, SupervisedRows

SIDES = "coordexp_sides"
"""Where an encoded sample carries `coord_sides` of its objects."""


class RowTyper:
    """Gives supervised rows the types of their true tokens.

    Arguments:
        tok: the tokenizer of the labels.
        counts: which datasets are counted; rows of samples from others get the type IGNORE.
        form: of the answers; None: CoordJSON.
    """

    def __init__(self, tok: Tokenizer, counts: DatasetFilter, form: AnswerForm | None = None) -> None:
        self._tok, self._counts, self._form = tok, counts, form or form_of()

    def labels_and_types(self, samples: Sequence[dict[str, Any]]) -> npt.NDArray[np.int64]:
        """int64 [2, S]: supervised labels of the samples, one sample after another, and their types."""
        parts = [np.empty((2, 0), dtype=np.int64)]
        for sample in samples:
            labels = np.asarray(sample["labels"], dtype=np.int64).ravel()
            labels = labels[labels != IGNORE_INDEX]
            is_counted = self._counts(SampleSource.of_sample(sample).dataset)
            types = (
                self._form.token_types(labels.tolist(), self._tok) if is_counted else np.zeros_like(labels)
            )
            parts.append(np.stack([labels, types]))
        return np.concatenate(parts, axis=1)


def row_types(
    labels_and_types: npt.NDArray[np.int64], labels_BT: Tensor, rows: SupervisedRows
) -> Tensor | None:
    """int8 [R], the type of the target of every row; None where the batch does not hold the samples' labels.

    labels_and_types: from `RowTyper`.  labels_BT: int64, the batch's labels, padded or packed; samples in order.
    rows: made from `labels_BT`.
    """
    flat = labels_BT.flatten()
    labels, types = torch.from_numpy(labels_and_types).unbind()
    if not torch.equal(flat[flat != IGNORE_INDEX], labels):
        return None
    return _of_rows(types, flat, rows, TokenType.IGNORE)


def row_parts(
    samples: Sequence[dict[str, Any]], names: Sequence[str], labels_BT: Tensor, rows: SupervisedRows
) -> Tensor | None:
    """int8 [R], the place among `names` of the data set that each row's sample was drawn from.

    samples: encoded, in the order in which the batch holds them, padded or packed.
    None where the batch does not hold all their labels, or one of them has another source.
    """
    sources = [SampleSource.of_sample(sample).part for sample in samples]
    if not set(sources) <= set(names):
        return None
    place = {name: index for index, name in enumerate(names)}
    counts = [int((np.asarray(sample["labels"]) != IGNORE_INDEX).sum()) for sample in samples]
    flat = labels_BT.flatten()
    if sum(counts) != int((flat != IGNORE_INDEX).sum()):
        return None
    parts = torch.from_numpy(np.repeat([place[source] for source in sources], counts))
    return _of_rows(parts, flat, rows, 0)


def coord_sides(objects: Sequence[BoxObject]) -> list[float]:
    """Of every coordinate of the objects: the side of its box along its axis, in bins; 0 of polygons."""
    sides: list[float] = []
    for obj in objects:
        if obj.kind == KIND_BBOX:
            x1, y1, x2, y2 = obj.bins
            sides += [float(x2 - x1), float(y2 - y1)] * 2
        else:
            sides += [0.0] * len(obj.bins)
    return sides


def row_sides(samples: Sequence[dict[str, Any]], rows: SupervisedRows) -> Tensor:
    """float32 [N], `SupervisedRows.sides_N` of rows that were made of the labels of `samples`, in their order.

    Raises RecordError naming the samples: the batch has other coordinates than their objects.
    """
    sides = [side for sample in samples for side in sample[SIDES]]
    if len(sides) != rows.num_coord:
        named = ", ".join(SampleSource.of_sample(sample).sample_id for sample in samples)
        raise RecordError(
            f"{named}: target_sigma_per_side needs the box of every coordinate, but the objects have {len(sides)} "
            f"coordinates and the labels {rows.num_coord}. Leave target_sigma_per_side out"
        )
    return torch.tensor(sides, dtype=torch.float32)


def _of_rows(values: Tensor, flat: Tensor, rows: SupervisedRows, fill: int) -> Tensor:
    """int8 [R]: of every row the value of its target. values: of the supervised labels of `flat`, in their order."""
    spread = torch.full_like(flat, fill, dtype=torch.int8)
    spread[flat != IGNORE_INDEX] = values.to(torch.int8)
    return spread[rows.positions_R + 1]  # row t predicts token t + 1 of the same sequence
