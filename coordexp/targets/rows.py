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
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import SupervisedRows, TextRole
from coordexp.losses.modules import ForwardKind, TextWeighting, TokenCE
from coordexp.targets.roles import NOT_A_ROW, text_roles
from coordexp.targets.sample import EncodedSample


def slot_positions(samples: Sequence[EncodedSample], starts: Sequence[int]) -> Tensor:
    """int64 [N]: tokens of the supervised coordinates in the flattened batch, in the order of their rows."""
    pairs = _paired(samples, starts)
    boxes = [sample.box_positions_B4 + start for sample, start in pairs]
    polygons = [sample.poly_positions_N + start for sample, start in pairs]
    return _stacked([*boxes, *polygons])


def stage2_rows(
    samples: Sequence[EncodedSample], starts: Sequence[int], columns: CoordColumns
) -> SupervisedRows:
    """Text rows with their roles, four rows of each supervised box, then the coordinates of supervised polygons."""
    return SupervisedRows.from_slots(
        *_text_rows(samples, starts),
        slot_positions(samples, starts) - 1,
        _stacked([s.box_bins_B4 for s in samples] + [s.poly_bins_N for s in samples]),
        columns,
        num_boxes=sum(sample.num_boxes for sample in samples),
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
        roles_T = text_roles(sample.roles_T, sample.types_T, coords_are_text=sample.coords_are_text)
        targets_T = sample.token_ids_T.copy()
        roles_T[sample.name_positions_M] = TextRole.MATCHED_DESC
        targets_T[sample.name_positions_M] = sample.name_ids_M
        at = np.flatnonzero(roles_T != NOT_A_ROW)
        positions.append(at + start - 1)
        targets.append(targets_T[at])
        roles.append(roles_T[at].astype(np.int64))
        dropped.append(np.full(len(at), sample.dropped_invalid))
    return _stacked(positions), _stacked(targets), _stacked(roles), _stacked(dropped).bool()


def _paired(samples: Sequence[EncodedSample], starts: Sequence[int]) -> list[tuple[EncodedSample, int]]:
    if len(samples) != len(starts):
        raise ContractError(f"{len(samples)} samples but {len(starts)} starts: give one start per sample")
    return list(zip(samples, starts, strict=True))


def _stacked(arrays: Sequence[np.ndarray]) -> Tensor:
    """The arrays of all samples one after another, flat, as one int64 tensor (of none: an empty one)."""
    flat = [np.asarray(array).ravel() for array in arrays]
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *flat]).astype(np.int64))
