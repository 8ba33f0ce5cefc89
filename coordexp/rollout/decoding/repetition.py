"""Repeat-aware termination: when has an answer lost itself in repetition?

The decision looks at the token ids of the answer so far and at nothing else, so every backend decides alike. An answer
of at least `min_new_tokens` tokens is ended when any of these holds:

    run        its last `max_consecutive_token_repeats` tokens are one token
    piece      its last `ngram_size` tokens occur in it `ngram_repeats` times, overlaps counted
    objects    it begins more than `max_object_keys` objects: it holds more `"desc"` keys, or `"label"` keys (Qwen's
               form), or begins more groups of four coordinate tokens where these follow one another without anything
               between them (compact form)

Ended means: the next token is `<|im_end|>`.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from coordexp.config.schema.rollout import RepeatTerminate

PieceOf = Callable[[int], bytes]
"""Bytes a token id stands for (`coordexp.codec.pieces.TokenPieces.__getitem__`)."""


class _Occurrences:
    """How often a text that comes piece by piece holds a few bytes, overlaps counted."""

    def __init__(self, wanted: bytes) -> None:
        self.number = 0
        self._wanted = re.compile(b"(?=" + re.escape(wanted) + b")")
        self._most = len(wanted) - 1
        self._tail = b""

    def extend(self, piece: bytes) -> None:
        text = self._tail + piece
        self.number += len(self._wanted.findall(text))
        self._tail = text[-self._most :]  # too short to hold what was counted


class _BegunObjects:
    """How many objects an answer that comes piece by piece has begun, in any form."""

    def __init__(self) -> None:
        self._descs, self._labels = _Occurrences(b'"desc"'), _Occurrences(b'"label"')
        self._coords, self._neighbours = _Occurrences(b"<|coord_"), _Occurrences(b"|><|coord_")

    def extend(self, piece: bytes) -> None:
        for counted in (self._descs, self._labels, self._coords, self._neighbours):
            counted.extend(piece)

    @property
    def number(self) -> int:
        boxes = -(-self._coords.number // 4) if self._neighbours.number else 0
        return max(self._descs.number, self._labels.number, boxes)


class RepeatDetector:
    """Follows one answer token by token; constant work per token.

    Arguments:
        piece_of: needed with `rules.max_object_keys`.
    """

    def __init__(self, rules: RepeatTerminate, piece_of: PieceOf | None = None) -> None:
        if rules.max_object_keys is not None and piece_of is None:
            raise ValueError("max_object_keys counts objects in the text: give piece_of")
        self.rules = rules
        self.num_tokens = 0
        self._piece_of = piece_of
        self._last: int | None = None
        self._run = 0
        self._ngram: deque[int] = deque(maxlen=rules.ngram_size)
        self._occurrences: Counter[tuple[int, ...]] = Counter()
        self._last_occurrences = 0
        self._objects = _BegunObjects()

    def extend(self, token_ids: Iterable[int]) -> None:
        """The next tokens of the answer."""
        for token_id in token_ids:
            self._append(token_id)

    @property
    def triggered(self) -> bool:
        """Is the answer so far to be ended?"""
        rules = self.rules
        if self.num_tokens < rules.min_new_tokens:
            return False
        return (
            self._run >= rules.max_consecutive_token_repeats
            or self._last_occurrences >= rules.ngram_repeats
            or (rules.max_object_keys is not None and self._objects.number > rules.max_object_keys)
        )

    def _append(self, token_id: int) -> None:
        self.num_tokens += 1
        self._run = self._run + 1 if token_id == self._last else 1
        self._last = token_id
        self._ngram.append(token_id)
        if len(self._ngram) == self.rules.ngram_size:
            ngram = tuple(self._ngram)
            self._occurrences[ngram] += 1
            self._last_occurrences = self._occurrences[ngram]
        if self._piece_of is not None and self.rules.max_object_keys is not None:
            self._objects.extend(self._piece_of(token_id))


def is_repeating(token_ids: Iterable[int], rules: RepeatTerminate, piece_of: PieceOf | None = None) -> bool:
    """Is the answer `token_ids` to be ended? (A `RepeatDetector` that saw it all.)"""
    detector = RepeatDetector(rules, piece_of)
    detector.extend(token_ids)
    return detector.triggered


def was_terminated(
    response_ids: Sequence[int],
    end_id: int,
    rules: RepeatTerminate | None,
    piece_of: PieceOf | None = None,
    *,
    guided: bool = False,
) -> bool:
    """Did termination under `rules` end this whole answer? None: no rules. guided: it ended some time later."""
    if rules is None or not response_ids or response_ids[-1] != end_id:
        return False
    if not guided:
        return is_repeating(response_ids[:-1], rules, piece_of)
    detector = RepeatDetector(rules, piece_of)
    for token_id in response_ids[:-1]:
        detector.extend((token_id,))
        if detector.triggered:
            return True
    return False


class RepeatTermination(LogitsProcessor):
    """Leaves `<|im_end|>` as the only choice of rows whose answers repeat themselves. For transformers' `generate`.

    Arguments:
        prompt_length: columns of `input_ids` before the answers.
        stop_ids: tokens that end an answer; what follows them in a row is padding.
    """

    def __init__(
        self, rules: RepeatTerminate, *, num_rows: int, prompt_length: int, end_id: int, stop_ids: Sequence[int],
        piece_of: PieceOf | None = None,
    ) -> None:  # fmt: skip
        self._detectors: list[RepeatDetector | None] = [
            RepeatDetector(rules, piece_of) for _ in range(num_rows)
        ]
        self._seen = prompt_length
        self._end_id = end_id
        self._stop_ids = frozenset(stop_ids)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: [rows, V]."""
        new_ids = input_ids[:, self._seen :].tolist()
        self._seen = input_ids.shape[1]
        rows = []
        for row, ids in enumerate(new_ids):
            detector = self._detectors[row]
            if detector is None:
                continue
            if self._stop_ids.intersection(ids):
                self._detectors[row] = None
                continue
            detector.extend(ids)
            if detector.triggered:
                rows.append(row)
        return force_token(scores, rows, self._end_id)


def force_token(scores_BV: Tensor, rows: Sequence[int], token_id: int) -> Tensor:
    """Make `token_id` the only possible token of `rows`, in place."""
    if rows:
        index = torch.tensor(rows, device=scores_BV.device)
        scores_BV[index] = float("-inf")
        scores_BV[index, token_id] = 0.0
    return scores_BV
