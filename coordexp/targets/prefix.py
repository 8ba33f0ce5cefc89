"""The rollout part of a target: which of its tokens are supervised, and as what.

The tokens are those the model wrote (the last one may be spelled anew, see `coordexp.targets.spelling`). A token
takes part with a matched record when it lies in it, apart from one separator that it may reach over: a token that
also holds a piece of an unmatched or dropped record, or any other stray text, teaches nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from coordexp.codec.parse import ParsedObject, ParsedRollout
from coordexp.codec.pieces import DecodedTokens, TokenPieces
from coordexp.codec.scanner import find_container
from coordexp.errors import ContractError
from coordexp.targets.roles import Int8Array, TokenRole

_SEPARATOR = re.compile(rb"[ \t\n\r]*+,?[ \t\n\r]*+")


def prefix_roles(parsed: ParsedRollout, matched_preds: Collection[int], pieces: TokenPieces) -> Int8Array:
    """TokenRole of each token of `parsed.prefix_token_ids`.

    matched_preds: indices into `parsed.objects` that have a partner. They are ignored when the prefix is the
    fallback, which holds no record.  Returns int8 [prefix length].
    """
    roles_P = np.full(len(parsed.prefix_token_ids), TokenRole.PREFIX, dtype=np.int8)
    if parsed.prefix_is_fallback or not parsed.records:
        return roles_P
    roles_R = np.full(len(parsed.response_token_ids), TokenRole.PREFIX, dtype=np.int8)
    for matched in (True, False):  # context comes last: a token shared with a matched record is context
        for record, role in zip(parsed.records, _record_roles(parsed, matched_preds), strict=True):
            if (role is TokenRole.MATCHED_PREFIX) is matched:
                roles_R[slice(*record.token_span)] = role
    untaught = (roles_R == TokenRole.MATCHED_PREFIX) & _holds_stray_text(parsed, pieces)
    roles_R[untaught] = TokenRole.PREFIX
    num_verbatim = parsed.num_verbatim_prefix_tokens
    roles_P[:num_verbatim] = roles_R[:num_verbatim]
    roles_P[num_verbatim:] = roles_R[num_verbatim : num_verbatim + 1]  # the cut token, spelled anew
    return roles_P


def _record_roles(parsed: ParsedRollout, matched_preds: Collection[int]) -> list[TokenRole]:
    """TokenRole of each of `parsed.records`."""
    roles: list[TokenRole] = []
    num_objects = 0
    for record in parsed.records:
        if not isinstance(record, ParsedObject):
            roles.append(TokenRole.DROPPED_PREFIX)
            continue
        roles.append(TokenRole.MATCHED_PREFIX if num_objects in matched_preds else TokenRole.FP_PREFIX)
        num_objects += 1
    return roles


def _holds_stray_text(parsed: ParsedRollout, pieces: TokenPieces) -> NDArray[np.bool_]:
    """Tokens that hold more than records, the container's opening and one separator, or no text at all.

    Only what comes before the end of the prefix counts. (A model with a padded vocabulary can write ids that
    its tokenizer has no text for.)  Returns bool [response length].
    """
    tokens = DecodedTokens.from_ids(parsed.response_token_ids, pieces)
    container = find_container(tokens.data)
    if container is None or tokens.text != parsed.text:
        raise ContractError(
            f"the response's ids decode to {tokens.text[:60]!r}..., its parsed text is {parsed.text[:60]!r}...: "
            "parse and build with the same tokenizer"
        )
    is_stray_R: NDArray[np.bool_] = np.diff(tokens.ends, prepend=0) == 0
    gap_start = container.body
    for start, stop in _record_bytes(parsed, tokens):
        first, after = tokens.tokens_over(gap_start, start)
        for index in range(first, after):
            in_gap = tokens.data[max(tokens.start_of(index), gap_start) : min(tokens.ends[index], start)]
            is_stray_R[index] |= _SEPARATOR.fullmatch(in_gap) is None
        gap_start = stop
    return is_stray_R


def _record_bytes(parsed: ParsedRollout, tokens: DecodedTokens) -> Iterator[tuple[int, int]]:
    """Bytes (start, stop) of each record: its character span, looked for in its first and its last token.

    A broken character has no fixed number of bytes, so the bytes between one end and the next are decoded.
    """
    byte = char = 0

    def advance(to_char: int, candidates: Iterable[int]) -> int:
        nonlocal byte, char
        for offset in candidates:
            if char + len(tokens.data[byte:offset].decode("utf-8", errors="replace")) == to_char:
                byte, char = offset, to_char
                return offset
        raise ContractError(
            f"no record begins or ends at character {to_char} of the response {parsed.text!r}"
        )

    for record in parsed.records:
        first, last = record.token_span[0], record.token_span[1] - 1
        starts = (i for i in range(tokens.start_of(first), tokens.ends[first]) if tokens.data[i] == ord("{"))
        stops = (i + 1 for i in range(tokens.start_of(last), tokens.ends[last]) if tokens.data[i] == ord("}"))
        yield advance(record.span[0], starts), advance(record.span[1], stops)
