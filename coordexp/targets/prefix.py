"""The rollout part of a target: which of its tokens are supervised, and as what.

The tokens are those the model wrote (the last one may be spelled anew, see `coordexp.targets.spelling`). A token
takes part with a matched record when it lies in it, apart from one separator that it may reach over: a token that
also holds a piece of an unmatched or dropped record, or any other stray text, teaches nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordexp.codec.parse import ParsedObject, ParsedRollout
from coordexp.codec.pieces import DecodedTokens, TokenPieces
from coordexp.errors import ContractError
from coordexp.matching.hungarian import MatchResult
from coordexp.targets.roles import Int8Array, TokenRole
from coordexp.targets.sample import PrefixEdits

_SEPARATOR = re.compile(rb"[ \t\n\r]*+,?[ \t\n\r]*+")


@dataclass(frozen=True)
class TaughtPrefix:
    """The prefix of a target, and what each record in it is.

    parsed: the answer, or what it was rewritten to.
    record_roles: TokenRole of each of `parsed.records`.
    partners: object of `parsed` -> its ground truth, of matched predictions.
    written: the same for objects that the ground truth wrote, not the model.
    """

    parsed: ParsedRollout
    record_roles: Sequence[TokenRole]
    partners: Mapping[int, int]
    written: Mapping[int, int]
    edits: PrefixEdits
    dropped_invalid: bool

    @classmethod
    def as_written(cls, parsed: ParsedRollout, match: MatchResult) -> TaughtPrefix:
        """The answer as the model wrote it."""
        partners = {} if parsed.prefix_is_fallback else dict(match.matched)
        roles = _record_roles(parsed, partners)
        return cls(parsed, roles, partners, {}, PrefixEdits(), parsed.dropped_invalid > 0)


def prefix_roles(prefix: TaughtPrefix, pieces: TokenPieces) -> Int8Array:
    """TokenRole of each token of `prefix.parsed.prefix_token_ids`; the fallback holds no record.

    Returns int8 [prefix length].
    """
    parsed = prefix.parsed
    roles_P = np.full(len(parsed.prefix_token_ids), TokenRole.PREFIX, dtype=np.int8)
    if parsed.prefix_is_fallback or not parsed.records:
        return roles_P
    roles_R = np.full(len(parsed.response_token_ids), TokenRole.PREFIX, dtype=np.int8)
    for matched in (True, False):  # context comes last: a token shared with a matched record is context
        for record, role in zip(parsed.records, prefix.record_roles, strict=True):
            if (role is TokenRole.MATCHED_PREFIX) is matched:
                roles_R[slice(*record.token_span)] = role
    untaught = (roles_R == TokenRole.MATCHED_PREFIX) & _holds_stray_text(parsed, pieces)
    roles_R[untaught] = TokenRole.PREFIX
    _mark_written(roles_R, prefix, pieces)
    num_verbatim = parsed.num_verbatim_prefix_tokens
    roles_P[:num_verbatim] = roles_R[:num_verbatim]
    roles_P[num_verbatim:] = roles_R[num_verbatim : num_verbatim + 1]  # the cut token, spelled anew
    return roles_P


def _mark_written(roles_R: Int8Array, prefix: TaughtPrefix, pieces: TokenPieces) -> None:
    """Objects that the ground truth wrote are tail: with the separator before them, and every token they share."""
    tokens = DecodedTokens.from_ids(prefix.parsed.response_token_ids, pieces)
    gap_start = prefix.parsed.body
    for record, role in zip(prefix.parsed.records, prefix.record_roles, strict=True):
        start, stop = gap_start, record.byte_span[1]
        if role is TokenRole.FN_TAIL:
            roles_R[slice(*tokens.tokens_over(start, stop))] = role
        gap_start = stop


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
    if tokens.text != parsed.text:
        raise ContractError(
            f"the response's ids decode to {tokens.text[:60]!r}..., its parsed text is {parsed.text[:60]!r}...: "
            "parse and build with the same tokenizer"
        )
    is_stray_R: NDArray[np.bool_] = np.diff(tokens.ends, prepend=0) == 0
    gap_start = parsed.body
    for start, stop in (record.byte_span for record in parsed.records):
        first, after = tokens.tokens_over(gap_start, start)
        for index in range(first, after):
            in_gap = tokens.data[max(tokens.start_of(index), gap_start) : min(tokens.ends[index], start)]
            is_stray_R[index] |= _SEPARATOR.fullmatch(in_gap) is None
        gap_start = stop
    return is_stray_R
