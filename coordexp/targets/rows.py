"""Samples in a batch or a pack -> the supervised rows of the forward over it.

The token at position t of a sample is predicted by row t - 1. `starts` says where each sample begins in the
flattened [B * T] batch: multiples of T in a padded batch, running totals of the lengths in a pack. A
supervised token is never a sample's first, so no row ever belongs to a neighbour.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from coordexp.errors import ContractError
from coordexp.geometry import IntArray
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import SupervisedRows
from coordexp.losses.modules import ForwardKind, TextWeighting, TokenCE
from coordexp.targets.roles import NOT_A_ROW, text_roles
from coordexp.targets.sample import EncodedSample


def stage1_rows(
    samples: Sequence[EncodedSample], starts: Sequence[int], columns: CoordColumns
) -> SupervisedRows:
    """Rows of all supervised tokens: text first, then the coordinates of boxes and polygons alike.

    The same rows as `SupervisedRows.from_labels` gives for the targets' labels.
    """
    text_positions, text_targets, _, _ = _text_rows(samples, starts)
    slots = [_sorted_slots(sample) for sample in samples]
    coord_positions = _stacked([at + start - 1 for (at, _), start in _paired(slots, starts)])
    bins_N = _stacked([bins for _, bins in slots])
    return SupervisedRows(
        positions_R=torch.cat([text_positions, coord_positions]),
        targets_R=torch.cat([text_targets, columns.index(bins_N.device)[bins_N]]),
        num_text=text_targets.numel(),
        bins_N=bins_N,
    )


def slot_positions_B4(samples: Sequence[EncodedSample], starts: Sequence[int]) -> Tensor:
    """int64 [number of boxes, 4]: tokens of the supervised boxes in the flattened batch, as in the rows."""
    slots = [sample.box_positions_B4 + start for sample, start in zip(samples, starts, strict=True)]
    return torch.from_numpy(np.concatenate(slots))


def stage2_rows(
    samples: Sequence[EncodedSample], starts: Sequence[int], columns: CoordColumns
) -> SupervisedRows:
    """Text rows with their roles, then four rows per supervised box.

    The objective of stage 2 is defined on boxes; vertices of polygons have no rows.
    """
    text_positions, text_targets, roles_R, dropped_R = _text_rows(samples, starts)
    box_positions = [sample.box_positions_B4 + start - 1 for sample, start in _paired(samples, starts)]
    return SupervisedRows.from_boxes(
        text_positions,
        text_targets,
        roles_R,
        dropped_R,
        _stacked(box_positions).view(-1, 4),
        _stacked([sample.box_bins_B4 for sample in samples]).view(-1, 4),
        columns,
    )


def ce_weights(sample: EncodedSample, token_ce: TokenCE, forward: ForwardKind) -> Tensor:
    """Cross-entropy weight w_t of every token of a sample in a forward; 0 where it has none.  float32 [T]."""
    positions_R, targets_R, roles_R, dropped_R = _text_rows([sample], [0])
    rows = SupervisedRows(
        positions_R,
        targets_R,
        targets_R.numel(),
        torch.zeros(0, dtype=torch.int64),
        roles_R=roles_R,
        dropped_invalid_R=dropped_R,
    )
    weights_T = torch.zeros(sample.num_tokens)
    weights_T[positions_R + 1] = TextWeighting(token_ce)(rows, forward).ce_R
    return weights_T


def _text_rows(
    samples: Sequence[EncodedSample], starts: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions, targets, TextRoles and dropped-invalid flags of all text rows, in order of position."""
    positions, targets, roles, dropped = [], [], [], []
    for sample, start in _paired(samples, starts):
        roles_T = text_roles(sample.roles_T, sample.types_T)
        at = np.flatnonzero(roles_T != NOT_A_ROW)
        positions.append(at + start - 1)
        targets.append(sample.token_ids_T[at])
        roles.append(roles_T[at].astype(np.int64))
        dropped.append(np.full(len(at), sample.dropped_invalid))
    return _stacked(positions), _stacked(targets), _stacked(roles), _stacked(dropped).bool()


def _sorted_slots(sample: EncodedSample) -> tuple[IntArray, IntArray]:
    """Positions and true bins of all coordinate slots, in order of position."""
    positions = np.concatenate([sample.box_positions_B4.ravel(), sample.poly_positions_N])
    bins = np.concatenate([sample.box_bins_B4.ravel(), sample.poly_bins_N])
    order = np.argsort(positions)
    return positions[order], bins[order]


def _paired(items: Sequence, starts: Sequence[int]) -> list:  # type: ignore[type-arg]
    if len(items) != len(starts):
        raise ContractError(f"{len(items)} samples but {len(starts)} starts: give one start per sample")
    return list(zip(items, starts, strict=True))


def _stacked(arrays: Sequence[np.ndarray]) -> Tensor:
    """The arrays of all samples one after another, flat, as one int64 tensor (of none: an empty one)."""
    flat = [np.asarray(array).ravel() for array in arrays]
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *flat]).astype(np.int64))
