"""Which columns of the logits are the coordinate tokens, and how much probability they hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coordexp.errors import ConfigError, ContractError
from coordexp.losses.sums import math_dtype


class CoordColumns:
    """The K coordinate-token ids in bin order, prepared once for use on every step.

    When the ids are consecutive (as when they were added to the vocabulary in one go) the columns are a
    slice of the logits and nothing is copied; otherwise index tensors are kept per device.

    Arguments:
        ids: token id of bin 0, of bin 1, ... K-1. None at all where answers write coordinates as numbers: no token is
            then a coordinate.
    Raises ConfigError for one id alone, a negative or a repeated one.
    """

    def __init__(self, ids: Sequence[int]):
        self.ids = tuple(int(i) for i in ids)
        if len(self.ids) == 1 or len(set(self.ids)) != len(self.ids) or min(self.ids, default=0) < 0:
            raise ConfigError(
                f"coordinate token ids: found {len(self.ids)} ids, {len(set(self.ids))} of them different; "
                "expected at least 2 different ids >= 0 in bin order. "
                "Take them from CoordVocab.from_tokenizer(...).ids."
            )
        first = self.ids[0] if self.ids else 0
        self.start: int | None = first if self.ids == tuple(range(first, first + len(self.ids))) else None
        self._cache: dict[tuple[object, ...], Tensor] = {}

    @classmethod
    def of(cls, coord_ids: CoordColumns | Sequence[int] | Tensor) -> CoordColumns:
        """Take ids in any form. Ids in a tensor on an accelerator cost a host sync: build it once."""
        if isinstance(coord_ids, CoordColumns):
            return coord_ids
        return cls(coord_ids.tolist() if isinstance(coord_ids, Tensor) else coord_ids)

    @property
    def num_bins(self) -> int:
        """K."""
        return len(self.ids)

    def index(self, device: torch.device) -> Tensor:
        """The ids as int64 [K] on `device`, copied there once."""
        return self._cached(("ids", device), lambda: torch.tensor(self.ids, dtype=torch.int64, device=device))

    def take(self, logits_NV: Tensor) -> Tensor:
        """The coordinate columns, [N, K], in bin order: a view when the ids are consecutive."""
        if self.start is not None:
            return logits_NV.narrow(-1, self.start, self.num_bins)
        return logits_NV.index_select(-1, self.index(logits_NV.device))

    def rows(self, weight_VX: Tensor) -> Tensor:
        """View of the coordinate tokens' rows of a weight or bias; only for consecutive ids."""
        if self.start is None:
            raise ContractError(
                "coordinate token ids are not consecutive: their rows are no view of the weight"
            )
        return weight_VX.narrow(0, self.start, self.num_bins)

    def split(self, logits_NV: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The coordinate columns [N, K] and the other columns in up to two pieces (none if V = K).

        Both come from one `torch.split` when the ids are consecutive, so the backward pass writes the
        gradient of the logits once.
        """
        vocab_size = logits_NV.shape[-1]
        if self.start is not None:
            left, coord, right = torch.split(
                logits_NV, [self.start, self.num_bins, vocab_size - self.start - self.num_bins], dim=-1
            )
            return coord, [piece for piece in (left, right) if piece.shape[-1]]
        others = self._cached(
            ("others", logits_NV.device, vocab_size), lambda: self._others(vocab_size, logits_NV.device)
        )
        rest = [logits_NV.index_select(-1, others)] if others.numel() else []
        return self.take(logits_NV), rest

    def fill_(self, logits_NV: Tensor, value: float) -> Tensor:
        """Set the coordinate columns to `value`, in place."""
        if self.start is not None:
            logits_NV.narrow(-1, self.start, self.num_bins).fill_(value)
            return logits_NV
        return logits_NV.index_fill_(-1, self.index(logits_NV.device), value)

    def add_(self, logits_NV: Tensor, values_NK: Tensor) -> Tensor:
        """Add `values_NK` to the coordinate columns, in place."""
        if self.start is not None:
            logits_NV.narrow(-1, self.start, self.num_bins).add_(values_NK)
            return logits_NV
        return logits_NV.index_add_(-1, self.index(logits_NV.device), values_NK)

    def assign_(self, logits_NV: Tensor, values_NK: Tensor) -> Tensor:
        """Set the coordinate columns to `values_NK`, in place."""
        if self.start is not None:
            logits_NV.narrow(-1, self.start, self.num_bins).copy_(values_NK)
            return logits_NV
        return logits_NV.index_copy_(-1, self.index(logits_NV.device), values_NK)

    def bins(self, token_ids: Tensor) -> Tensor:
        """Bin of each token id, -1 where it is not a coordinate token. Same shape, int64."""
        if self.start is not None:
            bins = token_ids - self.start
            return torch.where((bins >= 0) & (bins < self.num_bins), bins, -1)
        table = self._cached(("bins", token_ids.device), lambda: self._bin_table(token_ids.device))
        known = (token_ids >= 0) & (token_ids < table.numel())
        return torch.where(known, table[torch.where(known, token_ids, 0)], -1)

    def _cached(self, key: tuple[object, ...], make: Callable[[], Tensor]) -> Tensor:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def _others(self, vocab_size: int, device: torch.device) -> Tensor:
        is_other = torch.ones(vocab_size, dtype=torch.bool)
        is_other[list(self.ids)] = False
        return is_other.nonzero().squeeze(-1).to(device)

    def _bin_table(self, device: torch.device) -> Tensor:
        table = torch.full((max(self.ids) + 1,), -1, dtype=torch.int64)
        table[list(self.ids)] = torch.arange(self.num_bins)
        return table.to(device)


def coord_log_odds(logits_NV: Tensor, columns: CoordColumns, temperature: float = 1.0) -> Tensor:
    """Log-odds of "the next token is a coordinate": log p_coord - log(1 - p_coord), [N], float.

    Same as: p = softmax(z / T); log(p[C].sum()) - log(p[not C].sum()); computed from one log-sum-exp per
    side, so that it stays finite when either side holds practically all the probability. From it follow
    the coord gate (`-logsigmoid(odds)`), the text gate (`-logsigmoid(-odds)`) and the mass (`sigmoid(odds)`).
    """
    logits_NV = math_dtype(logits_NV)
    row_max_N1 = logits_NV.detach().amax(-1, keepdim=True)  # keeps large logits exact; cancels in the odds
    coord_NK, rest = columns.split(logits_NV)

    def log_sum(piece: Tensor) -> Tensor:
        return ((piece - row_max_N1) / temperature).logsumexp(-1)

    if not rest:
        return torch.full_like(coord_NK[:, 0], torch.inf) + 0.0 * coord_NK.sum(-1)
    log_rest_N = log_sum(rest[0]) if len(rest) == 1 else torch.logaddexp(*map(log_sum, rest))
    return log_sum(coord_NK) - log_rest_N
