"""Token accuracy by token type, and coordinate tokens where they should not be: numbers from whole logit rows.

Rows are compared with their targets where the logits exist, chunk by chunk (`TokenMetrics.observer`, for either
head). What is kept is a handful of numbers per row; `TokenMetrics.metrics` adds them up by the type of the
true token:

    desc     inside a description
    format   all other text: structure and `<|im_end|>`
    coord    a coordinate token, or where answers write numbers a token with digits of a coordinate
    text     desc and format together

Where the vocabulary has no coordinate columns (answers write numbers) nothing is said about tokens of that vocabulary
in the wrong place.

Nothing waits for the device: a type without rows leaves with count 0, which the metric store drops.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coordexp.codec.token_types import TokenType
from coordexp.head.fused import Observer
from coordexp.head.liger import OnPredicted
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import SupervisedRows
from coordexp.losses.sums import SumCount
from coordexp.metrics import keys_tokens as keys

GROUPS = ("desc", "format", "coord", "text")
DESC, FORMAT, COORD, TEXT = range(4)
TOP = 5
BLOCK_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}
"""float32 logits looked at in one go, by device type: bounds the memory of the softmax."""

FRAC = {DESC: keys.DESC_TOKEN_FRAC, FORMAT: keys.FORMAT_TOKEN_FRAC, COORD: keys.COORD_TOKEN_FRAC}
ACC = {DESC: keys.DESC_TOKEN_ACC, FORMAT: keys.FORMAT_TOKEN_ACC, COORD: keys.COORD_TOKEN_ACC}
ACC_TOP5 = {
    DESC: keys.DESC_TOKEN_ACC_TOP5,
    FORMAT: keys.FORMAT_TOKEN_ACC_TOP5,
    COORD: keys.COORD_TOKEN_ACC_TOP5,
}
FLIP_TO_COORD = {
    TEXT: keys.FLIP_TEXT_TO_COORD,
    FORMAT: keys.FLIP_FORMAT_TO_COORD,
    DESC: keys.FLIP_DESC_TO_COORD,
}
MASS = {
    COORD: keys.COORD_VOCAB_MASS_AT_GT_COORD,
    TEXT: keys.COORD_VOCAB_MASS_AT_GT_TEXT,
    FORMAT: keys.COORD_VOCAB_MASS_AT_GT_FORMAT,
    DESC: keys.COORD_VOCAB_MASS_AT_GT_DESC,
}


class TokenMetrics:
    """The token metrics of one forward.

    Arguments:
        rows: all supervised rows of the forward. With `types_R` everything is counted: the splits by type over rows
            whose type is not IGNORE, `token_acc*` and `text_token_acc` over all. Without, only `token_acc`.
        columns: the coordinate tokens; none where answers write numbers.
        top5: also count targets among the five largest logits.
        mass: also take the probability inside the coordinate vocabulary.
        mass_max_tokens: rows that probability is taken on at most (see `spread_rows`); 0 for all.
    """

    def __init__(
        self,
        rows: SupervisedRows,
        columns: CoordColumns,
        *,
        top5: bool = True,
        mass: bool = True,
        mass_max_tokens: int = 0,
    ) -> None:
        self._rows, self._columns = rows, columns
        self._top5 = top5 and rows.types_R is not None
        self._mass = mass and rows.types_R is not None
        self._chosen = spread_rows(rows.num_rows, mass_max_tokens) if self._mass else None
        self._num_seen = 0
        self._hits: list[Tensor] = []
        self._flips: list[Tensor] = []
        self._top5_hits: list[Tensor] = []
        self._masses: list[Tensor] = []

    def restart(self) -> None:
        """Forget what was seen: all rows come again."""
        self._num_seen = 0
        for seen in (self._hits, self._flips, self._top5_hits, self._masses):
            seen.clear()

    @property
    def observer(self) -> Observer:
        """What a head calls with the next rows, in their order, each once. Asks for no logits where arg-maxes do."""
        return self._observe if self._top5 or self._mass else OnPredicted(self._see)

    def _observe(self, logits_rV: Tensor, chunk: SupervisedRows) -> None:
        """Look at the logits of the next rows, a block at a time."""
        size = max(
            BLOCK_BYTES.get(logits_rV.device.type, BLOCK_BYTES["cuda"]) // (4 * logits_rV.shape[-1]), 1
        )
        for start in range(0, chunk.num_rows, size):
            block = slice(start, start + size)
            self._look(logits_rV[block], chunk.targets_R[block])
        self._see(logits_rV.argmax(-1), chunk)

    def metrics(self) -> dict[str, SumCount]:
        """Sum and count of every key, 0-dim tensors of one device. No host sync."""
        if not self._hits:
            return {}
        num_text = self._rows.num_text
        hits_R = torch.cat(self._hits)
        found = {keys.TOKEN_ACC: _over(hits_R)}
        types_R = self._rows.types_R
        if types_R is None:
            return found
        has_tokens = self._columns.num_bins > 0
        if num_text and has_tokens:
            found[keys.TEXT_TOKEN_ACC] = _over(hits_R[:num_text])
        members_GR = _members(types_R)
        counts_G = members_GR.sum(-1)

        def split(values_R: Tensor, names: dict[int, str], counts: Tensor = counts_G) -> None:
            sums_G = (members_GR * values_R).sum(-1)
            found.update({key: SumCount(sums_G[group], counts[group]) for group, key in names.items()})

        num_included = counts_G[TEXT] + counts_G[COORD]
        found.update({key: SumCount(counts_G[group], num_included) for group, key in FRAC.items()})
        split(hits_R, ACC if has_tokens else ACC | {TEXT: keys.TEXT_TOKEN_ACC})
        if has_tokens:
            flips_R = torch.cat(self._flips)
            split(flips_R, FLIP_TO_COORD)
            split(1.0 - flips_R, {COORD: keys.FLIP_COORD_TO_NONCOORD})
        if self._top5:
            top5_R = torch.cat(self._top5_hits)
            found[keys.TOKEN_ACC_TOP5] = _over(top5_R)
            split(top5_R, ACC_TOP5)
        if self._mass:
            mass_R, taken_R = torch.cat(self._masses, dim=1)
            split(mass_R, MASS, (members_GR * taken_R).sum(-1))
        return found

    def _see(self, predicted_r: Tensor, chunk: SupervisedRows) -> None:
        """Compare the arg-max of the next rows with their targets."""
        self._hits.append((predicted_r == chunk.targets_R).float())
        if self._rows.types_R is not None:
            self._flips.append((self._columns.bins(predicted_r) >= 0).float())

    def _look(self, logits_rV: Tensor, targets_r: Tensor) -> None:
        """Take from a block of logits what needs all of a row."""
        if self._top5:
            self._top5_hits.append(in_top(logits_rV, targets_r).float())
        if self._mass:
            self._masses.append(self._block_mass(logits_rV))
            self._num_seen += targets_r.numel()

    def _block_mass(self, logits_rV: Tensor) -> Tensor:
        """[2, r]: the coordinate mass of each row, and 1; both 0 where the row was not chosen."""
        num_rows = logits_rV.shape[0]
        if self._chosen is None:
            mass_r = coord_mass(logits_rV, self._columns)
            return torch.stack([mass_r, torch.ones_like(mass_r)])
        first, last = np.searchsorted(self._chosen, (self._num_seen, self._num_seen + num_rows))
        chosen = _to_device(self._chosen[first:last] - self._num_seen, logits_rV.device)
        mass_r = coord_mass(logits_rV.index_select(0, chosen), self._columns)
        values = torch.stack([mass_r, torch.ones_like(mass_r)])
        return values.new_zeros(2, num_rows).index_copy_(1, chosen, values)


def in_top(logits_RV: Tensor, targets_R: Tensor, k: int = TOP) -> Tensor:
    """Whether fewer than `k` logits of the row are larger than the target's, bool [R].

    logits_RV: [R, V]; targets_R: int64 [R].
    """
    kth_R = logits_RV.topk(min(k, logits_RV.shape[-1]), dim=-1).values[:, -1]
    return logits_RV.gather(1, targets_R.unsqueeze(1)).squeeze(1) >= kth_R


def coord_mass(logits_RV: Tensor, columns: CoordColumns) -> Tensor:
    """Probability inside the coordinate vocabulary, softmax(z)[C].sum(), float32 [R] (temperature 1)."""
    return columns.take(logits_RV.softmax(-1, dtype=torch.float32)).sum(-1)


def spread_rows(num_rows: int, most: int) -> npt.NDArray[np.int64] | None:
    """At most `most` of the rows 0..num_rows, ascending; None for all of them.

    Row i is ranked by the fractional part of i times the golden ratio, so the choice depends on nothing but the two
    numbers, is spread evenly, and has no period that could fall in with that of the objects in a sequence.
    """
    if most == 0 or num_rows <= most:
        return None
    rank = np.arange(num_rows) * ((5**0.5 - 1) / 2) % 1.0
    return np.sort(np.argpartition(rank, most - 1)[:most]).astype(np.int64)


def _members(types_R: Tensor) -> Tensor:
    """float32 [len(GROUPS), R]: 1 where the row belongs to the group."""
    desc_R, coord_R = types_R == TokenType.DESC, types_R == TokenType.COORD
    format_R = (types_R == TokenType.STRUCT) | (types_R == TokenType.EOS)
    return torch.stack([desc_R, format_R, coord_R, desc_R | format_R]).float()


def _over(values_R: Tensor) -> SumCount:
    return SumCount(values_R.sum(), values_R.new_full((), values_R.numel()))


def _to_device(indices: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    """Indices on `device`, without waiting for what it is doing."""
    on_host = torch.from_numpy(indices)
    return on_host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else on_host.to(device)
