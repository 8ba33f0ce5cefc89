"""What an objective may look at: the supervised rows, and a few numbers per row taken from the logits.

The objectives never see a [R, V] matrix. Everything they use is in `LossInputs`: the cross-entropy and the
coordinate log-odds of text rows, the K coordinate logits of coordinate rows. The plain head makes it with
`LossInputs.from_logits`, the fused head chunk by chunk (`head.run`), and the objectives cannot tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from coordexp.losses.columns import CoordColumns, coord_log_odds
from coordexp.losses.coord import CoordDistribution, box_sides
from coordexp.losses.sums import math_dtype

IGNORE_INDEX = -100


class TextRole(IntEnum):
    """What a supervised text token is, as far as its weight depends on it.

    Tokens that are never supervised (prompt, padding, unmatched predictions, and descriptions of matched
    predictions where they have no weight) have no row at all.
    """

    STRUCT = 0
    """Structure of a ground-truth or appended object."""
    DESC = 1
    """Inside the description of a ground-truth or appended object."""
    MATCHED_STRUCT = 2
    """Structure of a matched prediction in the rollout prefix."""
    CLOSE = 3
    """The end of the container, `]}`: structure that is always supervised."""
    EOS = 4
    """`<|im_end|>`, always supervised."""
    MATCHED_DESC = 5
    """Inside the description of a matched prediction in the rollout prefix, up to the first token that is not the
    true name's; there the target is the true name's token (with `rollout_matched_desc_weight` only)."""


@dataclass(frozen=True)
class SupervisedRows:
    """The rows of a forward that carry supervision: text rows first, then coordinate rows.

    Coordinate rows of boxes come first, four a box (x1, y1, x2, y2); then all others, each on its own: vertices of
    polygons in stage 2, every coordinate in stage 1.

    Row r is hidden state `positions_R[r]` of the flattened [B * T] batch and must predict the *next*
    token, `targets_R[r]`. Build it before the forward (on the host, or at the price of one sync).
    """

    positions_R: Tensor
    """int64 [R]: b * T + t."""
    targets_R: Tensor
    """int64 [R]: token ids."""
    num_text: int
    """The first `num_text` rows have text targets, the other N = R - num_text a coordinate token."""
    bins_N: Tensor
    """int64 [N]: true bins of the coordinate rows."""
    num_boxes: int = 0
    """The first 4 * num_boxes coordinate rows are boxes."""
    roles_R: Tensor | None = None
    """int64 [num_text] of TextRole (stage 2)."""
    dropped_invalid_R: Tensor | None = None
    """bool [num_text]: the row's sample dropped an invalid prediction (stage 2)."""
    types_R: Tensor | None = None
    """int8 [R] of codec.token_types.TokenType, for the token metrics; IGNORE where a row is not counted."""
    parts_R: Tensor | None = None
    """int8 [R]: the data set of a mixture that the row's sample is of, by its place among `num_parts`."""
    num_parts: int = 0
    """Data sets of the mixture."""
    sides_N: Tensor | None = None
    """float [N]: the side of the row's box along its axis, in bins; 0 for a vertex of a polygon. None: not known."""

    @classmethod
    def from_labels(cls, labels_BT: Tensor, columns: CoordColumns) -> SupervisedRows:
        """All supervised tokens of unshifted labels (-100: ignored); row t of a sequence predicts t + 1."""
        shifted_BT = torch.full_like(labels_BT, IGNORE_INDEX)
        shifted_BT[:, :-1] = labels_BT[:, 1:]
        return cls.from_targets(shifted_BT.flatten(), columns)

    @classmethod
    def from_targets(cls, targets_R: Tensor, columns: CoordColumns) -> SupervisedRows:
        """Sort rows given by their already shifted targets (-100: no supervision)."""
        bins_R = columns.bins(targets_R)
        text = ((bins_R < 0) & (targets_R != IGNORE_INDEX)).nonzero().squeeze(-1)
        coord = (bins_R >= 0).nonzero().squeeze(-1)
        positions_R = torch.cat([text, coord])
        return cls(positions_R, targets_R[positions_R], text.numel(), bins_R[coord])

    @classmethod
    def from_slots(
        cls,
        text_positions_R: Tensor,
        text_targets_R: Tensor,
        roles_R: Tensor,
        dropped_invalid_R: Tensor,
        slot_positions_N: Tensor,
        bins_N: Tensor,
        columns: CoordColumns,
        *,
        num_boxes: int,
    ) -> SupervisedRows:
        """Stage-2 rows: text rows with their roles, and the coordinate slots, boxes first.

        All positions are rows of the flattened hidden states, i.e. token position - 1.
        """
        sides_N = torch.zeros(bins_N.numel(), device=bins_N.device)
        sides_N[: 4 * num_boxes] = box_sides(bins_N[: 4 * num_boxes].view(-1, 4))
        return cls(
            positions_R=torch.cat([text_positions_R, slot_positions_N]),
            targets_R=torch.cat([text_targets_R, columns.index(bins_N.device)[bins_N]]),
            num_text=text_positions_R.numel(),
            bins_N=bins_N,
            num_boxes=num_boxes,
            roles_R=roles_R,
            dropped_invalid_R=dropped_invalid_R,
            sides_N=sides_N,
        )

    @property
    def num_rows(self) -> int:
        """R."""
        return self.targets_R.numel()

    @property
    def num_coord(self) -> int:
        """N."""
        return self.bins_N.numel()

    def text_slice(self, start: int, stop: int) -> SupervisedRows:
        """Only the text rows start..stop."""
        rows = slice(start, min(stop, self.num_text))
        return self._part(rows, rows, slice(0, 0))

    def coord_slice(self, start: int, stop: int) -> SupervisedRows:
        """Only the coordinate rows start..stop, counted from the first one; boxes must stay whole."""
        rows = slice(self.num_text + start, min(self.num_text + stop, self.num_rows))
        return self._part(rows, slice(0, 0), slice(start, stop))

    def chunks(self, size: int) -> Iterator[tuple[slice, SupervisedRows]]:
        """Pieces of at most `size` rows, text or coordinate, boxes kept whole; with their row range."""
        for start in range(0, self.num_text, size):
            piece = self.text_slice(start, start + size)
            yield slice(start, start + piece.num_rows), piece
        num_box_rows = 4 * self.num_boxes
        for first, last, step in (
            (0, num_box_rows, max(size - size % 4, 4)),
            (num_box_rows, self.num_coord, size),
        ):
            for start in range(first, last, step):
                piece = self.coord_slice(start, min(start + step, last))
                yield slice(self.num_text + start, self.num_text + start + piece.num_rows), piece

    def where(self, keep_R: Tensor) -> SupervisedRows:
        """Only the rows of a mask, bool [R]. One host sync."""
        keep_text, keep_N = keep_R[: self.num_text], keep_R[self.num_text :]

        def kept(values: Tensor | None, keep: Tensor) -> Tensor | None:
            return None if values is None else values[keep]

        return SupervisedRows(
            self.positions_R[keep_R],
            self.targets_R[keep_R],
            int(keep_text.sum()),
            self.bins_N[keep_N],
            int(keep_N[: 4 * self.num_boxes].sum()) // 4,
            kept(self.roles_R, keep_text),
            kept(self.dropped_invalid_R, keep_text),
            kept(self.types_R, keep_R),
            kept(self.parts_R, keep_R),
            self.num_parts,
            kept(self.sides_N, keep_N),
        )

    def _part(self, rows: slice, text: slice, coord: slice) -> SupervisedRows:
        """Some rows: where they are among all, among the text rows and among the coordinate rows."""
        bins_N = self.bins_N[coord]
        num_box_rows = min(4 * self.num_boxes, coord.stop) - coord.start
        return SupervisedRows(
            self.positions_R[rows],
            self.targets_R[rows],
            text.stop - text.start,
            bins_N,
            max(num_box_rows, 0) // 4,
            None if self.roles_R is None else self.roles_R[text],
            None if self.dropped_invalid_R is None else self.dropped_invalid_R[text],
            None if self.types_R is None else self.types_R[rows],
            None if self.parts_R is None else self.parts_R[rows],
            self.num_parts,
            None if self.sides_N is None else self.sides_N[coord],
        )


@dataclass(frozen=True)
class LossNeeds:
    """Which numbers an objective uses, so that no head computes others."""

    temperature: float = 1.0
    """T of the coordinate distribution and of the log-odds."""
    text_odds: bool = False
    """Coordinate log-odds of text rows (text gate)."""
    coord_odds: bool = False
    """Coordinate log-odds of coordinate rows (gate, coordinate mass)."""
    coord_ce: bool = False
    """Full-vocabulary cross-entropy of coordinate rows (pure-CE ablation)."""

    @property
    def coord_full_vocab(self) -> bool:
        """Do coordinate rows need more than their K coordinate logits?"""
        return self.coord_odds or self.coord_ce


@dataclass(frozen=True)
class LossInputs:
    """Per-row numbers of one forward (or of one chunk of it), connected to the graph."""

    rows: SupervisedRows
    needs: LossNeeds
    text_ce_R: Tensor
    """float [num_text]: cross-entropy over the whole vocabulary (T = 1)."""
    text_log_odds_R: Tensor | None
    """float [num_text], with `needs.text_odds`; see `coord_log_odds`."""
    coord_logits_NK: Tensor
    """float [N, K]: coordinate columns of the logits."""
    coord_log_odds_N: Tensor | None
    """float [N], with `needs.coord_odds`."""
    coord_ce_N: Tensor | None
    """float [N], with `needs.coord_ce` (T = 1)."""

    @classmethod
    def from_logits(
        cls, logits_RV: Tensor, rows: SupervisedRows, columns: CoordColumns, needs: LossNeeds
    ) -> LossInputs:
        """From the logits of exactly `rows`, in their order. No host sync."""
        text_RV, coord_NV = logits_RV[: rows.num_text], logits_RV[rows.num_text :]
        coord_targets_N = rows.targets_R[rows.num_text :]

        def odds(rows_of_logits: Tensor) -> Tensor:
            return coord_log_odds(rows_of_logits, columns, needs.temperature)

        return cls(
            rows=rows,
            needs=needs,
            text_ce_R=cross_entropy_rows(text_RV, rows.targets_R[: rows.num_text]),
            text_log_odds_R=odds(text_RV) if needs.text_odds else None,
            coord_logits_NK=math_dtype(columns.take(coord_NV)),
            coord_log_odds_N=odds(coord_NV) if needs.coord_odds else None,
            coord_ce_N=cross_entropy_rows(coord_NV, coord_targets_N) if needs.coord_ce else None,
        )

    @cached_property
    def distribution(self) -> CoordDistribution:
        """p over the bins of every coordinate row, at `needs.temperature`; shared by all atoms."""
        return CoordDistribution(self.coord_logits_NK, self.needs.temperature)


def cross_entropy_rows(logits_RV: Tensor, targets_R: Tensor) -> Tensor:
    """-log softmax(z)[target] over the whole vocabulary, float [R]."""
    return F.cross_entropy(math_dtype(logits_RV), targets_R, reduction="none")
