"""Which kind each token of a supervised sequence is: coordinate, description, eos or structure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from coordexp.codec.coord_vocab import Tokenizer
from coordexp.codec.layout import COORDJSON, JsonLayout
from coordexp.codec.pieces import DecodedTokens, pieces_of
from coordexp.codec.scanner import WS, find_container

_OPEN_ENDED_BODY = rb'(?:[^"\\]++|\\.)*+'
_OPEN_END = rb'(?:"|\\?\Z)'
_NUMBER = re.compile(rb"[0-9]++")


@cache
def _lexemes(desc_key: str) -> re.Pattern[bytes]:
    """Matches a description with its key, a geometry with its key, or any other string."""
    return re.compile(
        rb'"' + desc_key.encode() + rb'"' + WS + rb":" + WS + rb'"(?P<desc>' + _OPEN_ENDED_BODY + rb")" + _OPEN_END
        + rb'|"(?:bbox_2d|poly)"' + WS + rb":" + WS + rb'\[(?P<coords>[^\[\]{}"]*+)'
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
    """One of the 1000 coordinate tokens; where coordinates are numbers, overlaps one in a geometry array."""
    EOS = 4
    """`<|im_end|>`."""


def token_types(
    token_ids: Sequence[int], tok: Tokenizer, *, layout: JsonLayout = COORDJSON
) -> npt.NDArray[np.int8]:
    """TokenType of each token of a supervised sequence (an answer in `layout` and its `<|im_end|>`).

    Returns int8 [len(token_ids)]. Raises ConfigError when the layout needs coordinate tokens and the tokenizer lacks
    them.
    """
    ids = list(map(int, token_ids))
    pieces = pieces_of(tok)
    types = np.full(len(ids), TokenType.STRUCT, dtype=np.int8)
    tokens = DecodedTokens.from_ids(pieces.before_im_end(ids), pieces)
    types[_positions_over(tokens, _spans(tokens.data, layout, "desc"))] = TokenType.DESC
    if layout.scale is None:
        bin_of = pieces.coord_vocab.bin_by_id
        coords = [i for i, token_id in enumerate(ids) if token_id in bin_of]
    else:
        coords = _positions_over(tokens, _spans(tokens.data, layout, "coords"))
    types[coords] = TokenType.COORD
    types[[i for i, token_id in enumerate(ids) if token_id == pieces.im_end_id]] = TokenType.EOS
    return types


def desc_token_positions(
    token_ids: Iterable[int], tok: Tokenizer, *, layout: JsonLayout = COORDJSON
) -> list[int]:
    """Ascending positions of the tokens that overlap the inside of a desc string value (quotes excluded).

    Complete, dropped and cut records count alike: what decides is a string that follows the layout's key (`"desc"`).
    Tokens after the first `<|im_end|>` token are not looked at.
    """
    pieces = pieces_of(tok)
    tokens = DecodedTokens.from_ids(pieces.before_im_end(token_ids), pieces)
    return _positions_over(tokens, _spans(tokens.data, layout, "desc"))


def _positions_over(tokens: DecodedTokens, spans: Iterable[tuple[int, int]]) -> list[int]:
    """Ascending positions of the tokens that overlap any of these ascending byte ranges."""
    positions: list[int] = []
    for start, stop in spans:
        first, last = tokens.tokens_over(start, stop)
        if positions and first <= positions[-1]:
            first = positions[-1] + 1
        positions.extend(range(first, last))
    return positions


def _spans(data: bytes, layout: JsonLayout, of: Literal["desc", "coords"]) -> Iterator[tuple[int, int]]:
    """Byte ranges of the insides of desc values, or of the numbers in geometry arrays; what the text ends in counts."""
    container = find_container(data, is_array=layout.is_array)
    for match in _lexemes(layout.desc_key).finditer(data, container.body if container else 0):
        if match[of] is None:
            continue
        if of == "desc":
            yield match.span("desc")
        else:
            yield from (number.span() for number in _NUMBER.finditer(data, *match.span("coords")))
