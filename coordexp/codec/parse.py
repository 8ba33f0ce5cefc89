"""Rollout token ids -> objects, and the prefix a training target can continue. Token-aligned, no repair.

The way through: cut at the first `<|im_end|>`, find the container, then walk its array element by element.
Each complete record gives one object or one DropReason. A record ends at the `}` that balances its `{`;
strings are skipped and square brackets do not take part, so a broken record does not take the next with it.

Elements
    An element that is no object is dropped as key_invalid. A record that is not separated from the element
    before it by exactly one comma is malformed. A record the text ends in is not complete: it is neither an
    object nor a dropped one, it makes the rollout truncated.

Prefix
    Normally the response's own tokens up to the end of its last complete record, kept or dropped (up to the
    opening `[` when there is none). Earlier ids are never encoded anew; only a last token that reaches
    beyond the prefix is replaced, by tokens for exactly its kept bytes. Dropped records stay in it, as
    context. It is append-ready: `prefix_text + append_fragment(missed, prefix_text)` parses to the objects of
    the prefix followed by the appended ones. The sum is strict JSON (by `to_strict_json`) when what the
    prefix holds beside its kept records is; a malformed record stays as it was written.
    With no container, or with text before it, there is nothing a target could continue: the prefix is then
    the empty container `{"objects": [`, freshly encoded, and holds no object.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from coordexp.codec.coord_vocab import Tokenizer
from coordexp.codec.layout import COORDJSON, JsonLayout
from coordexp.codec.pieces import DecodedTokens, TokenPieces, pieces_of
from coordexp.codec.record_reader import RecordReader, RecordReading
from coordexp.codec.scanner import (
    ends_inside_container_opening,
    find_container,
    find_container_close,
    find_value_end,
    skip_space,
)
from coordexp.codec.schema import IM_END, BoxObject, DropReason, Span, check_field_order
from coordexp.codec.token_types import TokenType, desc_token_positions, token_types

__all__ = [
    "DroppedRecord",
    "ParsedObject",
    "ParsedRollout",
    "TokenType",
    "desc_token_positions",
    "parse_rollout",
    "token_types",
]


@dataclass(frozen=True, slots=True)
class ParsedObject(BoxObject):
    """A kept object and where it stands in the response.

    token_positions: of its coordinate tokens, one per bin, into `response_token_ids`. Where an answer writes numbers:
        of all tokens that hold one of its digits; those of one number are neighbours, those of two are not.
    span, desc_span: of the record and of the inside of its desc string, into `text`.
    token_span: half-open range of the tokens that overlap the record.
    """

    token_positions: tuple[int, ...]
    span: Span
    desc_span: Span
    token_span: tuple[int, int]
    byte_span: tuple[int, int] = field(default=(0, 0), compare=False, repr=False)
    """Of the record in the response's bytes."""
    desc_token_span: tuple[int, int] = field(default=(0, 0), compare=False, repr=False)
    """Half-open range of the tokens that overlap the description, which may stand before the record (compact form)."""

    @property
    def has_own_desc(self) -> bool:
        """Whether the description stands in the record, and not before it (compact form)."""
        return self.desc_span[0] >= self.span[0]

    def as_box(self) -> BoxObject:
        """The object alone; compares equal to a BoxObject with the same content."""
        return BoxObject(self.desc, self.kind, self.bins)


@dataclass(frozen=True, slots=True)
class DroppedRecord:
    """A complete record that is no object, and why.

    span: into `text`. token_span: half-open range of the tokens of `response_token_ids` that overlap it.
    """

    reason: DropReason
    span: Span
    token_span: tuple[int, int]
    byte_span: tuple[int, int] = field(default=(0, 0), compare=False, repr=False)
    """Of the record in the response's bytes."""


@dataclass(frozen=True, slots=True)
class ParsedRollout:
    """What one response holds.

    objects: kept objects in the order written.
    records: all complete records in the order written: the objects and, between them, the dropped ones.
    response_token_ids: the ids before the first `<|im_end|>`; text: what they decode to.
    prefix_token_ids, prefix_text: what a training target may continue; see the module's first lines.
    num_verbatim_prefix_tokens: how many leading ids of the prefix are the response's own. Positions in the
        response below it hold in the prefix too.
    invalid_rollout: no container was found.
    leading_text: there is text before the container, so its objects count but are not in the prefix.
    truncated: the response ends inside a record or before the container closes.
    dropped_by_reason: counts above zero. dropped_ambiguous is the count of `ambiguous`, dropped_invalid that
        of all other reasons together.
    """

    objects: list[ParsedObject]
    records: list[ParsedObject | DroppedRecord]
    response_token_ids: list[int]
    text: str
    prefix_token_ids: list[int]
    prefix_text: str
    num_verbatim_prefix_tokens: int
    invalid_rollout: bool
    leading_text: bool
    truncated: bool
    dropped_by_reason: dict[DropReason, int]
    body: int = field(default=0, compare=False, repr=False)
    """Where in the response's bytes the inside of the container begins."""

    @property
    def dropped_ambiguous(self) -> int:
        return self.dropped_by_reason.get(DropReason.AMBIGUOUS, 0)

    @property
    def dropped_invalid(self) -> int:
        return sum(self.dropped_by_reason.values()) - self.dropped_ambiguous

    @property
    def prefix_is_fallback(self) -> bool:
        """Whether the prefix is the freshly encoded empty container and no part of the response."""
        return self.invalid_rollout or self.leading_text

    @property
    def prefix_objects(self) -> list[ParsedObject]:
        """The kept objects that the prefix holds: all of them, or none when the prefix is the fallback."""
        return [] if self.prefix_is_fallback else self.objects


def parse_rollout(
    token_ids: Iterable[int],
    tok: Tokenizer,
    *,
    field_order: str = "desc_first",
    allow_poly: bool = True,
    layout: JsonLayout = COORDJSON,
) -> ParsedRollout:
    """Parse the response token ids of one rollout. Any ids are accepted; time is linear in their number.

    field_order: the order the model was taught. Records in the other order are read as well.
    allow_poly: False drops polygons as poly_unsupported.
    layout: of the answer; for others than CoordJSON see `coordexp.codec.layout`.
    Raises ConfigError for an unknown field order, or where the layout needs coordinate tokens and the tokenizer lacks
    them.
    """
    check_field_order(field_order)
    pieces = pieces_of(tok)
    tokens = decode_response(token_ids, pieces)
    reader = RecordReader(tokens, pieces, field_order, allow_poly, layout)
    container = find_container(tokens.data, is_array=layout.is_array)
    if container is None:
        is_cut = not layout.is_array and ends_inside_container_opening(tokens.data)
        return without_container(tokens, pieces, layout.opening, truncated=is_cut)
    walk = _walk_array(tokens, container.body, reader)
    if container.has_leading_text:
        prefix, num_verbatim = fallback_prefix(pieces, layout.opening), 0
    else:
        prefix = tokens.cut(walk.last_record_stop, pieces)
        num_verbatim = num_verbatim_tokens(tokens, walk.last_record_stop)
    is_closed = walk.array_stop is not None and (
        layout.is_array or find_container_close(tokens.data, walk.array_stop) is not None
    )
    return ParsedRollout(
        objects=[record for record in walk.records if isinstance(record, ParsedObject)],
        records=walk.records,
        response_token_ids=tokens.ids,
        text=tokens.text,
        prefix_token_ids=prefix.ids,
        prefix_text=prefix.text,
        num_verbatim_prefix_tokens=num_verbatim,
        invalid_rollout=False,
        leading_text=container.has_leading_text,
        truncated=not is_closed,
        dropped_by_reason=walk.dropped_by_reason,
        body=container.body,
    )


def decode_response(token_ids: Iterable[int], pieces: TokenPieces) -> DecodedTokens:
    """The tokens before the first `<|im_end|>`, be it the token itself or its text spelled by others."""
    tokens = DecodedTokens.from_ids(pieces.before_im_end(token_ids), pieces)
    spelled_at = tokens.data.find(IM_END.encode())
    return tokens if spelled_at < 0 else tokens.cut(spelled_at, pieces)


def without_container(
    tokens: DecodedTokens, pieces: TokenPieces, opening: str, *, truncated: bool
) -> ParsedRollout:
    """What a response without a container gives. opening: of answers in its form."""
    return ParsedRollout(
        objects=[],
        records=[],
        response_token_ids=tokens.ids,
        text=tokens.text,
        prefix_token_ids=fallback_prefix(pieces, opening).ids,
        prefix_text=opening,
        num_verbatim_prefix_tokens=0,
        invalid_rollout=True,
        leading_text=False,
        truncated=truncated,
        dropped_by_reason={},
    )


def fallback_prefix(pieces: TokenPieces, opening: str) -> DecodedTokens:
    """The empty container, freshly encoded."""
    return DecodedTokens.from_ids(list(pieces.opening_ids(opening)), pieces)


def num_verbatim_tokens(tokens: DecodedTokens, stop: int) -> int:
    """Number of tokens that lie wholly before the byte `stop`, up to the first that reaches it."""
    last = tokens.tokens_over(stop - 1, stop)[1] - 1
    return last + 1 if tokens.ends[last] == stop else last


@dataclass(frozen=True, slots=True)
class _Walk:
    """What an array holds. Offsets are bytes.

    last_record_stop: the end of the last complete record, or of the opening `[`.
    array_stop: just after the array's `]`; None when the text ends first.
    """

    records: list[ParsedObject | DroppedRecord]
    dropped_by_reason: dict[DropReason, int]
    last_record_stop: int
    array_stop: int | None


_COMMA, _SQUARE_CLOSE, _BRACE_OPEN, _BRACE_CLOSE = b",]{}"


def _walk_array(tokens: DecodedTokens, body: int, reader: RecordReader) -> _Walk:
    """Read every complete element of the array whose inside begins at the byte `body`."""
    data = tokens.data
    locator = RecordLocator(tokens)
    records: list[ParsedObject | DroppedRecord] = []
    num_non_objects = 0
    last_record_stop, array_stop = body, None
    separator = b""  # the first two commas and stray braces since the last element
    pos = skip_space(data, body)
    while pos < len(data):
        lead = data[pos]
        if lead == _SQUARE_CLOSE:
            array_stop = pos + 1
            break
        if lead in (_COMMA, _BRACE_CLOSE):
            separator = (separator + data[pos : pos + 1])[:2]
            stop = pos + 1
        elif lead == _BRACE_OPEN:
            reading = reader.read(pos)
            if reading is None:
                break
            if separator != (b"," if records or num_non_objects else b""):
                reading = RecordReading(reading.start, reading.stop, DropReason.MALFORMED)
            records.append(locator.locate(reading))
            stop = last_record_stop = reading.stop
            separator = b""
        else:
            value_stop = find_value_end(data, pos)
            if value_stop is None:
                break
            num_non_objects += 1
            stop = value_stop
            separator = b""
        pos = skip_space(data, stop)
    return _Walk(records, _count_drops(records, num_non_objects), last_record_stop, array_stop)


def _count_drops(records: list[ParsedObject | DroppedRecord], num_non_objects: int) -> dict[DropReason, int]:
    counts = Counter(record.reason for record in records if isinstance(record, DroppedRecord))
    counts[DropReason.KEY_INVALID] += num_non_objects
    return {reason: counts[reason] for reason in DropReason if counts[reason]}


class RecordLocator:
    """Turns record readings, in ascending order, into records with character spans and token ranges."""

    def __init__(self, tokens: DecodedTokens) -> None:
        self._tokens = tokens
        self._is_ascii = tokens.data.isascii()
        self._byte = 0
        self._char = 0

    def locate(self, reading: RecordReading) -> ParsedObject | DroppedRecord:
        """The object of a reading that is kept, else the dropped record."""
        token_span = self._tokens.tokens_over(reading.start, reading.stop)
        start = self.char_at(reading.start)
        if reading.reason is not None:
            span = (start, self.char_at(reading.stop))
            return DroppedRecord(reading.reason, span, token_span, (reading.start, reading.stop))
        desc_span = self.char_at(reading.desc_start), self.char_at(reading.desc_stop)
        return ParsedObject(
            reading.desc,
            reading.kind,
            reading.bins,
            token_positions=reading.token_positions,
            span=(start, self.char_at(reading.stop)),
            desc_span=desc_span,
            token_span=token_span,
            byte_span=(reading.start, reading.stop),
            desc_token_span=self._tokens.tokens_over(reading.desc_start, reading.desc_stop),
        )

    def char_at(self, offset: int) -> int:
        """Character offset of a byte offset at an ASCII delimiter, not before the last one asked for."""
        if self._is_ascii:
            return offset
        self._char += len(self._tokens.data[self._byte : offset].decode("utf-8", errors="replace"))
        self._byte = offset
        return self._char
