"""One record of a rollout: its object, or the one reason why it is dropped.

A record is read in one regular-expression match when it is written as `serialize` writes it. Anything else
takes the careful way, lexeme by lexeme, which decides between the drop reasons. Nothing is repaired.
"""

from __future__ import annotations

import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Literal, NamedTuple

from coordexp.codec.coord_vocab import COORD_TOKENS
from coordexp.codec.layout import COORDJSON, JsonLayout, Scale
from coordexp.codec.pieces import DecodedTokens, TokenPieces
from coordexp.codec.scanner import COORD_LITERAL, LOOSE_STRING, STRICT_STRING_BODY, WS, find_object_end
from coordexp.codec.schema import GEOMETRY_KINDS, KIND_BBOX, KIND_POLY, DropReason, arity_is_valid

_GEOMETRY = WS + rb'"(?P<kind>bbox_2d|poly)"' + WS + rb":" + WS + rb'\[(?P<coords>[^\[\]{}"]*+)\]' + WS


@cache
def _usual_forms(desc_key: str) -> tuple[re.Pattern[bytes], re.Pattern[bytes]]:
    """A record as `serialize` writes it, description first and geometry first."""
    key = b'"' + desc_key.encode() + b'"'
    desc = WS + key + WS + rb":" + WS + rb'"(?P<desc>' + STRICT_STRING_BODY + rb')"' + WS
    return (
        re.compile(rb"\{" + desc + rb"," + _GEOMETRY + rb"\}"),
        re.compile(rb"\{" + _GEOMETRY + rb"," + desc + rb"\}"),
    )


_LEXEME = re.compile(
    rb"[ \t\n\r]++|(?P<string>" + LOOSE_STRING + rb")|(?P<coord>" + COORD_LITERAL + rb")"
    rb'|(?P<punct>[{}\[\]:,])|(?P<bare>[^ \t\n\r{}\[\]:,"]++)',
    re.DOTALL,
)
_COORD_LITERALS = tuple(token.encode() for token in COORD_TOKENS)
_STRICT_STRING = re.compile(rb'"' + STRICT_STRING_BODY + rb'"')
_SCALAR = re.compile(rb"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")

# fmt: off
_GEOMETRY_LIKE_KEYS = frozenset((
    "bbox", "box", "boxes", "box_2d", "box_3d", "bbox_3d", "rbox", "obb", "quad", "rectangle",
    "polygon", "polyline", "line", "point", "points", "point_2d", "keypoints", "circle", "ellipse",
    "mask", "segmentation",
))
# fmt: on


_Coords = tuple[tuple[int, ...], tuple[int, ...]]
"""Bins, and the positions of their tokens."""


class RecordReading(NamedTuple):
    """A complete record. Offsets are bytes into the response.

    reason: why it is dropped, None when it is kept. The fields after it are set for kept records only.
    desc_start, desc_stop: the inside of the desc string, quotes excluded.
    token_positions: of its coordinates, one per bin; of written numbers all that hold a digit.
    """

    start: int
    stop: int
    reason: DropReason | None
    desc: str = ""
    kind: str = ""
    bins: tuple[int, ...] = ()
    token_positions: tuple[int, ...] = ()
    desc_start: int = 0
    desc_stop: int = 0


class _TokenCoords:
    """Coordinates that are coordinate tokens: bins come from the ids, and the text must agree."""

    def __init__(self, tokens: DecodedTokens, pieces: TokenPieces) -> None:
        self._data = tokens.data
        bins = list(map(pieces.coord_vocab.bin_by_id.get, tokens.ids))
        self._bins = [k for k in bins if k is not None]
        self._positions = [i for i, k in enumerate(bins) if k is not None]
        self._starts = array("I", [tokens.start_of(i) for i in self._positions])

    def usual(self, start: int, stop: int) -> _Coords | None:
        """The coordinates within these bytes, when they are written as `serialize` does."""
        inside = self._within(start, stop)
        bins = tuple(self._bins[inside])
        if b", ".join([_COORD_LITERALS[k] for k in bins]) != self._data[start:stop]:
            return None
        return bins, tuple(self._positions[inside])

    def bin_of(self, element: _Element) -> int | None:
        """The bin that an element of the array shows; None when it shows none."""
        return int(self._data[element.start + 8 : element.stop - 2]) if element.type == "coord" else None

    def agreed(self, geometry: _Value, shown: list[int]) -> _Coords:
        """The bins of the ids; _DropError (ambiguous) unless they are those that the array's text shows."""
        inside = self._within(geometry.start, geometry.stop)
        bins = tuple(self._bins[inside])
        places = [element.start for element in geometry.elements]
        if (places, shown) != (list(self._starts[inside]), list(bins)):
            raise _DropError(DropReason.AMBIGUOUS)
        return bins, tuple(self._positions[inside])

    def _within(self, start: int, stop: int) -> slice:
        """Which of the response's coordinate tokens begin within the bytes `start:stop`."""
        first = bisect_left(self._starts, start)
        return slice(first, bisect_left(self._starts, stop, first))


class _NumberCoords:
    """Coordinates that are written as numbers; the text alone decides."""

    def __init__(self, tokens: DecodedTokens, scale: Scale) -> None:
        self._tokens, self._data, self._scale = tokens, tokens.data, scale

    def usual(self, start: int, stop: int) -> _Coords | None:
        numbers = self._data[start:stop].split(b", ")
        bins = list(map(self._scale.bin_of_text, numbers))
        known = [k for k in bins if k is not None]
        if len(known) < len(bins):
            return None
        spans = []
        for number in numbers:
            spans.append((start, start + len(number)))
            start += len(number) + len(b", ")
        return tuple(known), self._over(spans)

    def bin_of(self, element: _Element) -> int | None:
        if element.type != "bare":
            return None
        return self._scale.bin_of_text(self._data[element.start : element.stop])

    def agreed(self, geometry: _Value, shown: list[int]) -> _Coords:
        return tuple(shown), self._over((element.start, element.stop) for element in geometry.elements)

    def _over(self, spans: Iterable[tuple[int, int]]) -> tuple[int, ...]:
        """Ascending positions of the tokens that overlap these bytes, each once."""
        over = (position for span in spans for position in range(*self._tokens.tokens_over(*span)))
        return tuple(dict.fromkeys(over))


class RecordReader:
    """Reads records at byte offsets of one response."""

    def __init__(
        self,
        tokens: DecodedTokens,
        pieces: TokenPieces,
        field_order: str,
        allow_poly: bool,
        layout: JsonLayout = COORDJSON,
    ) -> None:
        self._data = tokens.data
        self._allow_poly = allow_poly
        self._desc_key = layout.desc_key
        patterns = _usual_forms(layout.desc_key)
        self._patterns = patterns if field_order == "desc_first" else patterns[::-1]
        self._coords = (
            _TokenCoords(tokens, pieces) if layout.scale is None else _NumberCoords(tokens, layout.scale)
        )

    def read(self, start: int) -> RecordReading | None:
        """The record whose `{` is at `start`; None when the text ends before its `}`."""
        reading = self._read_canonical(start)
        if reading is not None:
            return reading
        stop = find_object_end(self._data, start)
        if stop is None:
            return None
        try:
            return self._read_carefully(start, stop)
        except _DropError as dropped:
            return RecordReading(start, stop, dropped.reason)

    def _read_canonical(self, start: int) -> RecordReading | None:
        """The record if it has the usual form and its coordinates are what the layout says, else None."""
        data = self._data
        match = self._patterns[0].match(data, start) or self._patterns[1].match(data, start)
        if match is None:
            return None
        coords = self._coords.usual(*match.span("coords"))
        if coords is None:
            return None
        bins, positions = coords
        desc = decode_string(match["desc"])
        if desc is None:
            return None
        kind = KIND_BBOX if match["kind"] == b"bbox_2d" else KIND_POLY
        reason = DropReason.MISSING_DESC if not desc.strip() else self._geometry_fault(kind, bins)
        if reason is not None:
            return RecordReading(start, match.end(), reason)
        return RecordReading(start, match.end(), None, desc, kind, bins, positions, *match.span("desc"))

    def _read_carefully(self, start: int, stop: int) -> RecordReading:
        members = _RecordSyntax(self._data, start, stop).members()
        desc, kind, geometry = _desc_and_geometry(members, self._desc_key)
        if kind == KIND_POLY and not self._allow_poly:
            raise _DropError(DropReason.POLY_UNSUPPORTED)
        shown = [k for element in geometry.elements if (k := self._coords.bin_of(element)) is not None]
        if len(shown) != len(geometry.elements):
            raise _DropError(DropReason.NON_COORD_TOKEN)
        if not arity_is_valid(kind, len(shown)):
            raise _DropError(DropReason.WRONG_ARITY)
        bins, positions = self._coords.agreed(geometry, shown)
        fault = self._geometry_fault(kind, bins)
        if fault is not None:
            raise _DropError(fault)
        return RecordReading(
            start, stop, None, desc.text, kind, bins, positions, desc.start + 1, desc.stop - 1
        )

    def _geometry_fault(self, kind: str, bins: Sequence[int]) -> DropReason | None:
        if kind == KIND_POLY and not self._allow_poly:
            return DropReason.POLY_UNSUPPORTED
        if not arity_is_valid(kind, len(bins)):
            return DropReason.WRONG_ARITY
        if kind == KIND_BBOX and (bins[2] < bins[0] or bins[3] < bins[1]):
            return DropReason.BBOX_INVALID
        return None


class _DropError(Exception):
    """The record is complete but not kept."""

    def __init__(self, reason: DropReason) -> None:
        super().__init__(reason)
        self.reason = reason


class _Element(NamedTuple):
    """An array element; `type` is `coord` for one bare coordinate token, `bare` for other text without quotes."""

    type: str | None
    start: int
    stop: int


class _Value(NamedTuple):
    """A member's value; `text` is set for strings, `elements` for arrays."""

    type: Literal["string", "array", "other"]
    start: int
    stop: int
    text: str = ""
    elements: tuple[_Element, ...] = ()


def _desc_and_geometry(members: list[tuple[str, _Value]], desc_key: str) -> tuple[_Value, str, _Value]:
    """The desc string, the geometry kind and the geometry array of a record, or _DropError for its keys."""
    values = dict(members)
    if len(values) != len(members):
        raise _DropError(DropReason.KEY_INVALID)
    if desc_key not in values:
        raise _DropError(DropReason.MISSING_DESC)
    kinds = [kind for kind in GEOMETRY_KINDS if kind in values]
    others = [key for key in values if key != desc_key and key not in GEOMETRY_KINDS]
    if not kinds:
        looks_like_one = any(key in _GEOMETRY_LIKE_KEYS or values[key].type == "array" for key in others)
        raise _DropError(DropReason.UNKNOWN_GEOM if looks_like_one else DropReason.MISSING_GEOM)
    if others or len(kinds) > 1:
        raise _DropError(DropReason.KEY_INVALID)
    desc, geometry = values[desc_key], values[kinds[0]]
    if desc.type != "string" or not desc.text.strip():
        raise _DropError(DropReason.MISSING_DESC)
    if geometry.type != "array":
        raise _DropError(DropReason.MISSING_GEOM)
    return desc, kinds[0], geometry


class _RecordSyntax:
    """Strict syntax of one record: an object of members, whose values may hold bare coordinate tokens.

    Deeper values than a member's array are checked for balance and for their strings only. Raises _DropError
    (malformed) at the first fault.
    """

    def __init__(self, data: bytes, start: int, stop: int) -> None:
        self._data = data
        self._lexemes = [m for m in _LEXEME.finditer(data, start, stop) if m.lastgroup is not None]
        self._next = 0

    def members(self) -> list[tuple[str, _Value]]:
        """(key, value) of each member in the order written; keys may repeat."""
        members: list[tuple[str, _Value]] = []
        self._expect(b"{")
        if self._take_if(b"}"):
            return members
        while True:
            key = self._string(self._take())
            self._expect(b":")
            members.append((key, self._value()))
            if self._take_if(b"}"):
                return members
            self._expect(b",")

    def _value(self) -> _Value:
        lexeme = self._take()
        start, stop = lexeme.span()
        if lexeme.lastgroup == "string":
            return _Value("string", start, stop, text=self._string(lexeme))
        if lexeme[0] == b"[":
            elements = self._elements()
            return _Value("array", start, self._lexemes[self._next - 1].end(), elements=elements)
        if lexeme[0] == b"{":
            self._skip_nested(b"}")
        elif lexeme.lastgroup == "punct" or (lexeme.lastgroup == "bare" and not _SCALAR.fullmatch(lexeme[0])):
            raise _DropError(DropReason.MALFORMED)
        return _Value("other", start, self._lexemes[self._next - 1].end())

    def _elements(self) -> tuple[_Element, ...]:
        """The elements of an array whose `[` is taken, up to and with its `]`."""
        elements: list[_Element] = []
        if self._take_if(b"]"):
            return ()
        while True:
            lexeme = self._take()
            if lexeme.lastgroup == "string":
                self._string(lexeme)
            elif lexeme[0] in (b"[", b"{"):
                self._skip_nested(b"]" if lexeme[0] == b"[" else b"}")
            elif lexeme.lastgroup == "punct":
                raise _DropError(DropReason.MALFORMED)
            elements.append(_Element(lexeme.lastgroup, *lexeme.span()))
            if self._take_if(b"]"):
                return tuple(elements)
            self._expect(b",")

    def _skip_nested(self, closing: bytes) -> None:
        """Take lexemes up to the bracket that closes a nested value."""
        open_brackets = [closing]
        while open_brackets:
            lexeme = self._take()
            if lexeme.lastgroup == "string":
                self._string(lexeme)
            elif lexeme[0] in (b"[", b"{"):
                open_brackets.append(b"]" if lexeme[0] == b"[" else b"}")
            elif lexeme[0] in (b"]", b"}") and lexeme[0] != open_brackets.pop():
                raise _DropError(DropReason.MALFORMED)

    def _string(self, lexeme: re.Match[bytes]) -> str:
        text = decode_string(lexeme[0][1:-1]) if _STRICT_STRING.fullmatch(lexeme[0]) else None
        if text is None:
            raise _DropError(DropReason.MALFORMED)
        return text

    def _take(self) -> re.Match[bytes]:
        if self._next >= len(self._lexemes):
            raise _DropError(DropReason.MALFORMED)
        self._next += 1
        return self._lexemes[self._next - 1]

    def _take_if(self, punct: bytes) -> bool:
        found = self._next < len(self._lexemes) and self._lexemes[self._next][0] == punct
        self._next += found
        return found

    def _expect(self, punct: bytes) -> None:
        if not self._take_if(punct):
            raise _DropError(DropReason.MALFORMED)


def decode_string(body: bytes) -> str | None:
    """The text of the inside of a strict JSON string; None when its escapes make a lone surrogate."""
    text = body.decode("utf-8", errors="replace")
    if b"\\" not in body:
        return text
    decoded: str = json.loads(f'"{text}"')
    try:
        decoded.encode("utf-8")
    except UnicodeEncodeError:
        return None
    return decoded
