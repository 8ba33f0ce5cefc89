"""One record of a rollout: its object, or the one reason why it is dropped.

A record is read in one regular-expression match when it is written as `serialize` writes it. Anything else
takes the careful way, lexeme by lexeme, which decides between the drop reasons. Nothing is repaired.
"""

from __future__ import annotations

import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal, NamedTuple

from coordexp.codec.coord_vocab import COORD_TOKENS
from coordexp.codec.pieces import DecodedTokens, TokenPieces
from coordexp.codec.scanner import COORD_LITERAL, LOOSE_STRING, STRICT_STRING_BODY, WS, find_object_end
from coordexp.codec.schema import GEOMETRY_KINDS, KIND_BBOX, KIND_POLY, DropReason, arity_is_valid

_DESC = WS + rb'"desc"' + WS + rb":" + WS + rb'"(?P<desc>' + STRICT_STRING_BODY + rb')"' + WS
_GEOMETRY = WS + rb'"(?P<kind>bbox_2d|poly)"' + WS + rb":" + WS + rb'\[(?P<coords>[^\[\]{}"]*+)\]' + WS
_DESC_FIRST = re.compile(rb"\{" + _DESC + rb"," + _GEOMETRY + rb"\}")
_GEOMETRY_FIRST = re.compile(rb"\{" + _GEOMETRY + rb"," + _DESC + rb"\}")

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


class RecordReading(NamedTuple):
    """A complete record. Offsets are bytes into the response.

    reason: why it is dropped, None when it is kept. The fields after it are set for kept records only.
    desc_start, desc_stop: the inside of the desc string, quotes excluded.
    token_positions: of its coordinates, one per bin.
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


class RecordReader:
    """Reads records at byte offsets of one response."""

    def __init__(
        self, tokens: DecodedTokens, pieces: TokenPieces, field_order: str, allow_poly: bool
    ) -> None:
        self._data = tokens.data
        self._allow_poly = allow_poly
        patterns = (_DESC_FIRST, _GEOMETRY_FIRST)
        self._patterns = patterns if field_order == "desc_first" else patterns[::-1]
        bins = list(map(pieces.coord_vocab.bin_by_id.get, tokens.ids))
        self._coord_bins = [k for k in bins if k is not None]
        self._coord_positions = [i for i, k in enumerate(bins) if k is not None]
        self._coord_starts = array("I", [tokens.start_of(i) for i in self._coord_positions])

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
        """The record if it has the usual form and its coordinates are coordinate tokens, else None."""
        data = self._data
        match = self._patterns[0].match(data, start) or self._patterns[1].match(data, start)
        if match is None:
            return None
        coords_start, coords_stop = match.span("coords")
        coords = self._coords_in(coords_start, coords_stop)
        bins = tuple(self._coord_bins[coords])
        if b", ".join([_COORD_LITERALS[k] for k in bins]) != data[coords_start:coords_stop]:
            return None
        desc = _decode_string(match["desc"])
        if desc is None:
            return None
        kind = KIND_BBOX if match["kind"] == b"bbox_2d" else KIND_POLY
        reason = DropReason.MISSING_DESC if not desc.strip() else self._geometry_fault(kind, bins)
        if reason is not None:
            return RecordReading(start, match.end(), reason)
        positions = tuple(self._coord_positions[coords])
        return RecordReading(start, match.end(), None, desc, kind, bins, positions, *match.span("desc"))

    def _read_carefully(self, start: int, stop: int) -> RecordReading:
        members = _RecordSyntax(self._data, start, stop).members()
        desc, kind, geometry = _desc_and_geometry(members)
        if kind == KIND_POLY and not self._allow_poly:
            raise _DropError(DropReason.POLY_UNSUPPORTED)
        text_coords = [
            (element.start, element.bin) for element in geometry.elements if element.bin is not None
        ]
        if len(text_coords) != len(geometry.elements):
            raise _DropError(DropReason.NON_COORD_TOKEN)
        if not arity_is_valid(kind, len(text_coords)):
            raise _DropError(DropReason.WRONG_ARITY)
        coords = self._coords_in(geometry.start, geometry.stop)
        bins = tuple(self._coord_bins[coords])
        if text_coords != list(zip(self._coord_starts[coords], bins, strict=True)):
            raise _DropError(DropReason.AMBIGUOUS)
        fault = self._geometry_fault(kind, bins)
        if fault is not None:
            raise _DropError(fault)
        positions = tuple(self._coord_positions[coords])
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

    def _coords_in(self, start: int, stop: int) -> slice:
        """Which of the response's coordinate tokens begin within the bytes `start:stop`."""
        first = bisect_left(self._coord_starts, start)
        return slice(first, bisect_left(self._coord_starts, stop, first))


class _DropError(Exception):
    """The record is complete but not kept."""

    def __init__(self, reason: DropReason) -> None:
        super().__init__(reason)
        self.reason = reason


class _Element(NamedTuple):
    """An array element; `bin` is None unless it is one bare coordinate token."""

    start: int
    bin: int | None


class _Value(NamedTuple):
    """A member's value; `text` is set for strings, `elements` for arrays."""

    type: Literal["string", "array", "other"]
    start: int
    stop: int
    text: str = ""
    elements: tuple[_Element, ...] = ()


def _desc_and_geometry(members: list[tuple[str, _Value]]) -> tuple[_Value, str, _Value]:
    """The desc string, the geometry kind and the geometry array of a record, or _DropError for its keys."""
    values = dict(members)
    if len(values) != len(members):
        raise _DropError(DropReason.KEY_INVALID)
    if "desc" not in values:
        raise _DropError(DropReason.MISSING_DESC)
    kinds = [kind for kind in GEOMETRY_KINDS if kind in values]
    others = [key for key in values if key != "desc" and key not in GEOMETRY_KINDS]
    if not kinds:
        looks_like_one = any(key in _GEOMETRY_LIKE_KEYS or values[key].type == "array" for key in others)
        raise _DropError(DropReason.UNKNOWN_GEOM if looks_like_one else DropReason.MISSING_GEOM)
    if others or len(kinds) > 1:
        raise _DropError(DropReason.KEY_INVALID)
    desc, geometry = values["desc"], values[kinds[0]]
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
            is_coord = lexeme.lastgroup == "coord"
            elements.append(_Element(lexeme.start(), int(lexeme[0][8:-2]) if is_coord else None))
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
        text = _decode_string(lexeme[0][1:-1]) if _STRICT_STRING.fullmatch(lexeme[0]) else None
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


def _decode_string(body: bytes) -> str | None:
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
