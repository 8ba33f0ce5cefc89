"""The rollout part of a target: which of its tokens are supervised, and as what.

The tokens are those the model wrote (only the last one may be spelled anew, see `coordexp.codec.parse`). A
token takes part with a matched record when it lies in it, apart from separators that it may reach over: a
token that also holds a piece of an unmatched or dropped record, or any other stray text, teaches nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

import numpy as np

from coordexp.codec.parse import ParsedRecord, ParsedRollout
from coordexp.codec.pieces import DecodedTokens, TokenPieces
from coordexp.codec.scanner import find_container
from coordexp.errors import ContractError
from coordexp.targets.roles import Int8Array, Role

_SEPARATOR = re.compile(rb"[ \t\n\r]*+,?[ \t\n\r]*+")


def prefix_roles(parsed: ParsedRollout, matched_preds: Collection[int], pieces: TokenPieces) -> Int8Array:
    """Role of each token of `parsed.prefix_token_ids`.

    matched_preds: indices into `parsed.objects` that have a partner. They are ignored when the prefix is the
    fallback, which holds no record.  Returns int8 [prefix length].
    """
    roles_P = np.full(len(parsed.prefix_token_ids), Role.PREFIX, dtype=np.int8)
    if parsed.prefix_is_fallback or not parsed.records:
        return roles_P
    response = _RecordBytes(parsed, pieces)
    roles_R = np.full(len(parsed.response_token_ids), Role.PREFIX, dtype=np.int8)
    context: list[tuple[slice, Role]] = []
    num_objects = 0
    for record in parsed.records:
        tokens = slice(*record.token_span)
        start, stop = response.locate(record)
        is_object = record.object is not None
        if is_object and num_objects in matched_preds:
            roles_R[tokens] = Role.MATCHED_PREFIX
            roles_R[response.reaching_over_stray_text(record, start, stop)] = Role.PREFIX
        else:
            context.append((tokens, Role.FP_PREFIX if is_object else Role.DROPPED_PREFIX))
        num_objects += is_object
    for tokens, role in context:  # last, so that a token shared with a matched record is context
        roles_R[tokens] = role
    num_verbatim = parsed.num_verbatim_prefix_tokens
    roles_P[:num_verbatim] = roles_R[:num_verbatim]
    roles_P[num_verbatim:] = roles_R[num_verbatim : num_verbatim + 1]  # the cut token, spelled anew
    return roles_P


class _RecordBytes:
    """Byte offsets of the records of a response, asked for in the order they are written."""

    def __init__(self, parsed: ParsedRollout, pieces: TokenPieces) -> None:
        self._tokens = DecodedTokens.from_ids(parsed.response_token_ids, pieces)
        container = find_container(self._tokens.data)
        if container is None or self._tokens.text != parsed.text:
            raise ContractError(
                f"the response's ids decode to {self._tokens.text[:60]!r}..., its parsed text is "
                f"{parsed.text[:60]!r}...: parse and build with the same tokenizer"
            )
        self._body = container.body
        self._num_verbatim = parsed.num_verbatim_prefix_tokens
        self._byte = self._char = 0

    def locate(self, record: ParsedRecord) -> tuple[int, int]:
        """Bytes of the record: its character span, looked for within its first and its last token."""
        data, (first, after) = self._tokens.data, record.token_span
        first_token = range(self._tokens.start_of(first), self._tokens.ends[first])
        last_token = range(self._tokens.start_of(after - 1), self._tokens.ends[after - 1])
        start = self._advance_to(record.span[0], (at for at in first_token if data[at] == ord("{")))
        stop = self._advance_to(record.span[1], (at + 1 for at in last_token if data[at] == ord("}")))
        return start, stop

    def reaching_over_stray_text(self, record: ParsedRecord, start: int, stop: int) -> list[int]:
        """Which of the record's first and last token hold more than the record and one separator.

        What the token that the prefix is cut in holds after the record is not in the prefix.
        """
        data, (first, after) = self._tokens.data, record.token_span
        before = data[max(self._tokens.start_of(first), self._body) : start]
        behind = data[stop : self._tokens.ends[after - 1]] if after <= self._num_verbatim else b""
        found = []
        if not _SEPARATOR.fullmatch(before):
            found.append(first)
        if not _SEPARATOR.fullmatch(behind):
            found.append(after - 1)
        return found

    def _advance_to(self, char: int, candidates: Iterable[int]) -> int:
        """The candidate byte offset that is at character `char`.

        A broken character has no fixed number of bytes, so the bytes since the last offset are decoded.
        """
        for offset in candidates:
            between = self._tokens.data[self._byte : offset].decode("utf-8", errors="replace")
            if self._char + len(between) == char:
                self._byte, self._char = offset, char
                return offset
        raise ContractError(
            f"no token boundary of the response fits a record at character {char}: parse and build with the "
            "same tokenizer"
        )
