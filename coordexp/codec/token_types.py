"""Which kind each token of a supervised sequence is: coordinate, description, eos or structure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from coordexp.codec.coord_vocab import Tokenizer
from coordexp.codec.pieces import DecodedTokens, pieces_of
from coordexp.codec.scanner import WS, find_container

_OPEN_ENDED_BODY = rb'(?:[^"\\]++|\\.)*+'
_OPEN_END = rb'(?:"|\\?\Z)'
_DESC_OR_STRING = re.compile(
    rb'"desc"' + WS + rb":" + WS + rb'"(?P<desc>' + _OPEN_ENDED_BODY + rb")" + _OPEN_END
    + rb'|"' + _OPEN_ENDED_BODY + _OPEN_END,
    re.DOTALL,
)  # fmt: skip


class TokenType(IntEnum):
    """Mutually exclusive types; where several would fit, the first of eos, coord, desc, struct holds."""

    IGNORE = 0
    """Prompt and padding. Never given by `token_types`; for builders that lay out whole sequences."""
    STRUCT = 1
    """Everything that is no other type: braces, keys, separators. Metrics call it `format`."""
    DESC = 2
    """Overlaps the inside of a desc string value."""
    COORD = 3
    """One of the 1000 coordinate tokens."""
    EOS = 4
    """`<|im_end|>`."""


def token_types(token_ids: Sequence[int], tok: Tokenizer) -> npt.NDArray[np.int8]:
    """TokenType of each token of a supervised sequence (CoordJSON and its `<|im_end|>`).

    Returns int8 [len(token_ids)]. Raises ConfigError when the tokenizer lacks coordinate tokens.
    """
    ids = list(map(int, token_ids))
    pieces = pieces_of(tok)
    types = np.full(len(ids), TokenType.STRUCT, dtype=np.int8)
    types[desc_token_positions(ids, tok)] = TokenType.DESC
    types[[i for i, token_id in enumerate(ids) if token_id in pieces.coord_vocab.bin_by_id]] = TokenType.COORD
    types[[i for i, token_id in enumerate(ids) if token_id == pieces.im_end_id]] = TokenType.EOS
    return types


def desc_token_positions(token_ids: Iterable[int], tok: Tokenizer) -> list[int]:
    """Ascending positions of the tokens that overlap the inside of a desc string value (quotes excluded).

    Complete, dropped and cut records count alike: what decides is a string that follows the key `"desc"`.
    Tokens after the first `<|im_end|>` token are not looked at.
    """
    pieces = pieces_of(tok)
    tokens = DecodedTokens.from_ids(pieces.before_im_end(token_ids), pieces)
    positions: list[int] = []
    for start, stop in _desc_values(tokens.data):
        first, last = tokens.tokens_over(start, stop)
        if positions and first <= positions[-1]:
            first = positions[-1] + 1
        positions.extend(range(first, last))
    return positions


def _desc_values(data: bytes) -> Iterator[tuple[int, int]]:
    """Byte ranges of the insides of desc string values; a value the text ends in counts too."""
    container = find_container(data)
    for match in _DESC_OR_STRING.finditer(data, container.body if container else 0):
        if match["desc"] is not None:
            yield match.span("desc")
