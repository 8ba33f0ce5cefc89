"""Where a token of a sample comes from, and what that and its type mean for its cross-entropy.

    | role           | struct           | desc | coord |
    |----------------|------------------|------|-------|
    | GROUND_TRUTH   | STRUCT           | DESC | slot  |
    | FN_TAIL        | STRUCT           | DESC | slot  |
    | MATCHED_PREFIX | MATCHED_STRUCT   | *    | slot  |
    | CLOSURE        | CLOSE            |      |       |
    | EOS            | EOS (type eos)   |      |       |
    | all others     | -                | -    | -     |

(* where names of matched predictions are taught: MATCHED_DESC, see `EncodedSample.name_positions_M`.)

The entries are `coordexp.losses.inputs.TextRole`s, which the weights of `token_ce` are defined on. A slot is
supervised by the coordinate losses and never by the cross-entropy. Where coordinates are numbers there are no slots:
those of GROUND_TRUTH and FN_TAIL are STRUCT, those of MATCHED_PREFIX, which the model wrote, have no role.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from coordexp.codec.token_types import TokenType
from coordexp.losses.inputs import TextRole

Int8Array = NDArray[np.int8]


class TokenRole(IntEnum):
    """Part of the sequence that a token belongs to; mutually exclusive."""

    PROMPT = 0
    """System and user turns, image placeholders, the opening of the assistant turn."""
    GROUND_TRUTH = 1
    """A target written from the annotations alone, up to the last record."""
    PREFIX = 2
    """Rollout prefix outside of all records: the container's opening, separators, stray text."""
    MATCHED_PREFIX = 3
    """A predicted record that was matched to a ground truth, with the separators its tokens reach over."""
    FP_PREFIX = 4
    """A predicted record without a partner: context only."""
    DROPPED_PREFIX = 5
    """A record that the parser refused: context only."""
    FN_TAIL = 6
    """Appended records of the ground truths that were missed, with their separators and the token they begin in."""
    CLOSURE = 7
    """Every token that holds a part of the final `]}`."""
    EOS = 8
    """The final `<|im_end|>`."""


SLOT_ROLES = (TokenRole.GROUND_TRUTH, TokenRole.MATCHED_PREFIX, TokenRole.FN_TAIL)
"""Roles whose coordinate tokens may be supervised."""

NOT_A_ROW = -1
"""In arrays of TextRole: the token has no cross-entropy."""

_TEXT_ROLES = {
    (TokenRole.GROUND_TRUTH, TokenType.STRUCT): TextRole.STRUCT,
    (TokenRole.GROUND_TRUTH, TokenType.DESC): TextRole.DESC,
    (TokenRole.FN_TAIL, TokenType.STRUCT): TextRole.STRUCT,
    (TokenRole.FN_TAIL, TokenType.DESC): TextRole.DESC,
    (TokenRole.MATCHED_PREFIX, TokenType.STRUCT): TextRole.MATCHED_STRUCT,
    (TokenRole.CLOSURE, TokenType.STRUCT): TextRole.CLOSE,
    (TokenRole.CLOSURE, TokenType.DESC): TextRole.CLOSE,
    (TokenRole.EOS, TokenType.EOS): TextRole.EOS,
}


_ROLES_OF_NUMBERS = {
    (TokenRole.GROUND_TRUTH, TokenType.COORD): TextRole.STRUCT,
    (TokenRole.FN_TAIL, TokenType.COORD): TextRole.STRUCT,
    (TokenRole.CLOSURE, TokenType.COORD): TextRole.CLOSE,
}


def _lookup_table(text_roles: Mapping[tuple[TokenRole, TokenType], TextRole]) -> Int8Array:
    table = np.full((len(TokenRole), len(TokenType)), NOT_A_ROW, dtype=np.int8)
    for (role, token_type), text_role in text_roles.items():
        table[role, token_type] = text_role
    return table


_TEXT_ROLE_TABLE = _lookup_table(_TEXT_ROLES)
_TABLE_WITH_NUMBERS = _lookup_table(_TEXT_ROLES | _ROLES_OF_NUMBERS)


def text_roles(roles_T: Int8Array, types_T: Int8Array, *, coords_are_text: bool = False) -> Int8Array:
    """TextRole of each token, NOT_A_ROW where it has no cross-entropy.  int8 [T].

    coords_are_text: coordinates are numbers.
    """
    table = _TABLE_WITH_NUMBERS if coords_are_text else _TEXT_ROLE_TABLE
    found: Int8Array = table[roles_T, types_T]
    return found
