"""The nouns every codec module shares, and the two words for "where": span and token positions.

span
    A half-open character range `(start, stop)` into the text it is given with: `text[start:stop]`.
token_positions
    Indices into a list of token ids. A token belongs to a span when its characters overlap the
    span; a token that overlaps two spans belongs to both (merges such as `"}, {"` do that).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from numbers import Integral

from coordexp.errors import ConfigError

NUM_BINS = 1000
"""Coordinate bins per axis; bin k stands for the unit position k / (NUM_BINS - 1)."""

KIND_BBOX = "bbox_2d"
KIND_POLY = "poly"
GEOMETRY_KINDS = (KIND_BBOX, KIND_POLY)

FIELD_ORDERS = ("desc_first", "geometry_first")
IM_END = "<|im_end|>"
CONTAINER_OPEN = '{"objects": ['
CONTAINER_CLOSE = "]}"

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class BoxObject:
    """One described object.

    desc: the description: any text that is more than blanks, in Unicode's NFC form (given in another, it is brought to
        it), so that one description is one text from the record to the score.
    kind: `"bbox_2d"` (bins x1, y1, x2, y2) or `"poly"` (bins x1, y1, x2, y2, ..., at least three points).
    bins: ints in 0..999, x before y.
    """

    desc: str
    kind: str
    bins: tuple[int, ...]

    def __post_init__(self) -> None:
        if isinstance(self.desc, str) and not unicodedata.is_normalized("NFC", self.desc):
            object.__setattr__(self, "desc", unicodedata.normalize("NFC", self.desc))
        if type(self.bins) is not tuple or any(type(value) is not int for value in self.bins):
            object.__setattr__(self, "bins", tuple(_plain_int(value) for value in self.bins))


_DRAWN_AS_NOTHING = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Letters and signs by their category, blanks on paper."""


def is_blank(desc: str) -> bool:
    """Whether a text shows nothing: white space, control and format characters, or no character at all."""
    return all(
        char in _DRAWN_AS_NOTHING or char.isspace() or unicodedata.category(char) in ("Cc", "Cf")
        for char in desc
    )


def _plain_int(value: object) -> object:
    """Integers of any library as int; everything else (a bool, a float) as it is, for `bins_fault` to refuse."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


class DropReason(StrEnum):
    """Why a complete record of a rollout is not among its objects. Each dropped record has exactly one."""

    MISSING_DESC = "missing_desc"
    """`desc` is absent, not a string, empty, or blanks only."""
    MISSING_GEOM = "missing_geom"
    """No geometry key at all, or its value is not an array."""
    WRONG_ARITY = "wrong_arity"
    """`bbox_2d` without exactly 4 coordinates, or `poly` with an odd count or fewer than 6."""
    NON_COORD_TOKEN = "non_coord_token"
    """An element of the geometry array is anything but a bare `<|coord_0|>` .. `<|coord_999|>`."""
    POLY_UNSUPPORTED = "poly_unsupported"
    """A polygon where the caller takes boxes only."""
    UNKNOWN_GEOM = "unknown_geom"
    """No known geometry, but another key that looks like one (`bbox`, `polygon`, or any array)."""
    BBOX_INVALID = "bbox_invalid"
    """x2 < x1 or y2 < y1."""
    KEY_INVALID = "key_invalid"
    """A repeated key, a key beside desc and one geometry, or an array element that is not an object."""
    MALFORMED = "malformed"
    """The record, or the separator before it, is not JSON (coordinate tokens aside)."""
    AMBIGUOUS = "ambiguous"
    """The text shows other coordinates than the token ids do (a coordinate spelled by ordinary tokens)."""


def arity_is_valid(kind: str, num_values: int) -> bool:
    """Whether `num_values` coordinates make a shape: 4 for a box, an even count >= 6 for a polygon."""
    if kind == KIND_BBOX:
        return num_values == 4
    return num_values >= 6 and num_values % 2 == 0


def bins_fault(kind: str, bins: Sequence[object]) -> str | None:
    """What is wrong with the kind, count, type or range of `bins`, in words; None when nothing is."""
    if kind not in GEOMETRY_KINDS:
        return f"geometry kind is {kind!r}, expected one of {', '.join(GEOMETRY_KINDS)}"
    for index, value in enumerate(bins):
        if isinstance(value, bool) or not isinstance(value, int):
            return (
                f"{kind}[{index}] is {value!r}, expected an int in 0..{NUM_BINS - 1} (bins are never rounded)"
            )
        if not 0 <= value < NUM_BINS:
            return f"{kind}[{index}] is {value}, expected a bin in 0..{NUM_BINS - 1}"
    if not arity_is_valid(kind, len(bins)):
        expected = "4 values (x1, y1, x2, y2)" if kind == KIND_BBOX else "an even count of at least 6 values"
        return f"{kind} has {len(bins)} values, expected {expected}"
    return None


def check_field_order(field_order: str) -> None:
    """Raise ConfigError unless `field_order` is one that CoordJSON knows."""
    if field_order not in FIELD_ORDERS:
        raise ConfigError(
            f"custom.object_field_order is {field_order!r}, expected one of {', '.join(FIELD_ORDERS)}"
        )
