"""Lexical view of CoordJSON bytes: where the container, the records and the strings begin and end.

Everything works on UTF-8 bytes. All delimiters of JSON are ASCII, and an ASCII byte never occurs inside a
multi-byte character, so byte offsets of delimiters are exact even where a character is broken.

Every pattern uses possessive quantifiers: no input makes them backtrack, so scanning is linear.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

WS = rb"[ \t\n\r]*+"
LOOSE_STRING = rb'"(?:[^"\\]++|\\.)*+"'
"""A string as far as its end is concerned; its inside may still be no JSON."""
STRICT_STRING_BODY = rb'(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+'
"""The inside of a JSON string: no raw control characters, no unknown escapes."""

COORD_LITERAL = rb"<\|coord_(0|[1-9][0-9]{0,2})\|>"
"""The one spelling of a coordinate token, group 1 its bin; `<|coord_07|>` and `<|coord_1000|>` are none."""

_CONTAINER = re.compile(rb"\{" + WS + rb'"objects"' + WS + rb":" + WS + rb"\[")
_BRACES = re.compile(LOOSE_STRING + rb'|[{}"]', re.DOTALL)
_SQUARES = re.compile(LOOSE_STRING + rb'|[\[\]"]', re.DOTALL)
_STRING = re.compile(LOOSE_STRING, re.DOTALL)
_BARE_RUN = re.compile(rb'[^,\[\]{}"]++')
_SPACE = re.compile(WS)


def _partial_container_pattern() -> re.Pattern[bytes]:
    """Matches text that ends while still writing the container's opening."""
    steps = [rb"\{", WS, *(bytes([char]) for char in b'"objects"'), WS, rb":", WS]
    pattern = b""
    for step in reversed(steps[1:]):
        pattern = rb"(?:" + step + pattern + rb")?"
    return re.compile(steps[0] + pattern + rb"\Z")


_PARTIAL_CONTAINER = _partial_container_pattern()


@dataclass(frozen=True, slots=True)
class Container:
    """Byte offsets of `{"objects": [`: `start` at its `{` (of an array: its `[`), `body` just after its `[`."""

    start: int
    body: int
    has_leading_text: bool


def find_container(data: bytes, *, is_array: bool = False) -> Container | None:
    """The container, which must stand at the first `{` of the text, or None.

    An object with another key first, or whose `objects` is no array, is therefore no container, and neither
    is one nested in it.

    is_array: the container is an array alone, at the first `[`, which no `{` may stand before.
    """
    start = data.find(b"{")
    if is_array:
        array = data.find(b"[")
        if array < 0 or 0 <= start < array:
            return None
        return Container(array, array + 1, bool(data[:array].strip(b" \t\n\r")))
    match = _CONTAINER.match(data, start) if start >= 0 else None
    if match is None:
        return None
    return Container(start, match.end(), bool(data[:start].strip(b" \t\n\r")))


def ends_inside_container_opening(data: bytes) -> bool:
    """Whether the text stops in the middle of writing `{"objects": [`."""
    start = data.find(b"{")
    return start >= 0 and _PARTIAL_CONTAINER.match(data, start) is not None


def skip_space(data: bytes, pos: int) -> int:
    """The first offset at or after `pos` that holds no JSON whitespace."""
    match = _SPACE.match(data, pos)
    return match.end() if match else pos


def find_object_end(data: bytes, start: int) -> int | None:
    """Offset just after the `}` that balances the `{` at `start`; None when the text ends first.

    Only braces outside strings count, so a record with a missing or superfluous square bracket still ends
    where it ends. An unterminated string swallows the rest of the text.
    """
    return _find_balance(_BRACES, b"{", b"}", data, start)


def find_container_close(data: bytes, pos: int) -> int | None:
    """Offset just after the `}` that closes an object whose inside is at `pos`; None when it never closes."""
    return _find_balance(_BRACES, b"{", b"}", data, pos, depth=1)


def find_value_end(data: bytes, start: int) -> int | None:
    """Offset just after the array element at `start` that is no object: an array, a string or a bare run.

    None when the text ends inside it.
    """
    first = data[start : start + 1]
    if first == b"[":
        return _find_balance(_SQUARES, b"[", b"]", data, start)
    if first == b'"':
        match = _STRING.match(data, start)
        return match.end() if match else None
    match = _BARE_RUN.match(data, start)
    if match is None or match.end() == len(data):
        return None
    return match.end()


def _find_balance(
    pattern: re.Pattern[bytes], opening: bytes, closing: bytes, data: bytes, start: int, depth: int = 0
) -> int | None:
    for match in pattern.finditer(data, start):
        lexeme = match[0]
        if lexeme == opening:
            depth += 1
        elif lexeme == closing:
            depth -= 1
            if depth == 0:
                return match.end()
        elif lexeme == b'"':
            return None
    return None
