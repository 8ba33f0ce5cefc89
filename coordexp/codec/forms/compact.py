"""The compact form: a line for a name, and behind the name four coordinate tokens for each of its boxes.

[
cat<|coord_12|><|coord_40|><|coord_310|><|coord_402|>
dog<|coord_0|><|coord_4|><|coord_50|><|coord_99|><|coord_1|><|coord_2|><|coord_3|><|coord_4|>]

    answer  = "[" newline [ run { newline run } ] "]"
    run     = name box { box }
    box     = four coordinate tokens: x1, y1, x2, y2

A run takes the objects that follow one another under one name. A name is written with the escapes of a JSON string, but
for quotation marks, which stay as they are; `<|` is written `\\u003c|`, and a `]` that it begins with `\\u005d`. So no
name holds a line's end or a coordinate token, and none looks like the end of the answer. There are no polygons.

Reading is as strict as that of CoordJSON, with its reasons: a line without coordinates is missing_geom, one without a
name missing_desc, a number of coordinates that four does not divide wrong_arity, anything else between or behind
coordinates non_coord_token, a name with an unknown escape or a bare `<|` malformed, and so is an empty line; each drops
the whole line. A box whose corners are swapped is dropped alone. A line that the text ends in is not complete: its
whole boxes count, the rest makes the answer truncated.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from coordexp.codec.coord_vocab import Tokenizer, coord_token, coord_token_bin
from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.parse import (
    DroppedRecord,
    ParsedObject,
    ParsedRollout,
    RecordLocator,
    decode_response,
    fallback_prefix,
    num_verbatim_tokens,
    without_container,
)
from coordexp.codec.pieces import DecodedTokens, pieces_of
from coordexp.codec.record_reader import RecordReading, decode_string
from coordexp.codec.scanner import COORD_LITERAL
from coordexp.codec.schema import KIND_BBOX, BoxObject, DropReason
from coordexp.codec.serialize import check_writable, keep_normal, not_append_ready
from coordexp.codec.token_types import TokenType
from coordexp.errors import RecordError

_OPENING, _SEPARATOR, _CLOSING = "[\n", "\n", "]"
_NAME = re.compile(rb"(?:[^\n<]++|<(?!\|coord_(?:0|[1-9][0-9]{0,2})\|>))*+")
"""Up to the first coordinate token or the end of the line."""
_COORDS = re.compile(rb"(?:<\|coord_(?:0|[1-9][0-9]{0,2})\|>)*+")
_COORD = re.compile(COORD_LITERAL)
_STRAY = re.compile(rb"[^\n\]]*+")
_WRITTEN_NAME = re.compile(rb'(?:[^\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+')
_ESCAPE_OR_QUOTE = re.compile(rb'\\.|"', re.DOTALL)


class _Run(NamedTuple):
    """A line. Offsets are bytes.

    name_stop: the end of its name.  coords_stop: of the coordinates right behind it.
    stop: of the line, without what ends it.  is_complete: the text goes on behind it.
    """

    start: int
    name_stop: int
    coords_stop: int
    stop: int
    is_complete: bool


@dataclass(frozen=True, slots=True)
class _Lines:
    """What stands behind the opening. is_closed: with the closing bracket."""

    runs: list[_Run]
    is_closed: bool


def _read_lines(data: bytes, body: int) -> _Lines:
    """Every line behind the opening, up to the closing bracket or the end of the text."""
    runs: list[_Run] = []
    pos, size = body, len(data)
    while True:
        if data[pos : pos + 1] == b"]":
            return _Lines(runs, True)
        name_stop = _end_of(_NAME, data, pos)
        coords_stop = _end_of(_COORDS, data, name_stop)
        stop = coords_stop if coords_stop == name_stop else _end_of(_STRAY, data, coords_stop)
        runs.append(_Run(pos, name_stop, coords_stop, stop, stop < size))
        if stop == size:
            return _Lines(runs, False)
        if data[stop : stop + 1] == b"]":
            return _Lines(runs, True)
        pos = stop + 1


def _end_of(pattern: re.Pattern[bytes], data: bytes, pos: int) -> int:
    match = pattern.match(data, pos)
    assert match is not None  # each of them matches the empty text
    return match.end()


def _name_of(written: bytes) -> str | None:
    """The name that is written so; None when it is no name as `serialize` writes one."""
    if b"<|" in written or not _WRITTEN_NAME.fullmatch(written):
        return None
    return decode_string(_ESCAPE_OR_QUOTE.sub(lambda m: b'\\"' if m[0] == b'"' else m[0], written))


def _written(name: str) -> str:
    """A name as it stands in an answer."""
    text = json.dumps(name, ensure_ascii=False)[1:-1].replace('\\"', '"').replace("<|", "\\u003c|")
    return keep_normal("\\u005d" + text[1:] if text.startswith("]") else text)


class CompactForm(AnswerForm):
    """See the module's first lines."""

    name = "compact"
    opening, closing, separator = _OPENING, _CLOSING, _SEPARATOR
    most_bytes_per_object = len(_SEPARATOR)
    most_tokens_per_coord = 1

    @property
    def has_coord_tokens(self) -> bool:
        return True

    def serialize(self, objects: Iterable[BoxObject]) -> str:
        return _OPENING + _SEPARATOR.join(_runs_of(objects)) + _CLOSING

    def written_desc(self, desc: str) -> str:
        return _written(desc)

    def append_fragment(self, objects: Iterable[BoxObject], prefix_text: str) -> str:
        data = prefix_text.encode("utf-8", errors="replace")
        if not data.startswith(_OPENING.encode()):
            raise not_append_ready(prefix_text, "it has no open list", _OPENING)
        lines = _read_lines(data, len(_OPENING))
        if lines.is_closed:
            raise not_append_ready(prefix_text, "its list is already closed", _OPENING)
        last = lines.runs[-1]
        if last.start == last.stop == len(_OPENING):
            return _SEPARATOR.join(_runs_of(objects)) + _CLOSING
        runs = list(_runs_of(objects))
        name = _shared_name(data, last)
        if name is None:  # a line that was dropped ends with its line
            return "".join(_SEPARATOR + run for run in runs) + (_CLOSING if runs else _SEPARATOR + _CLOSING)
        if runs and runs[0].startswith(_written(name) + "<|coord_"):
            return _SEPARATOR.join([runs[0][len(_written(name)) :], *runs[1:]]) + _CLOSING
        return "".join(_SEPARATOR + run for run in runs) + _CLOSING

    def parse(self, token_ids: Iterable[int], tok: Tokenizer, *, allow_poly: bool = True) -> ParsedRollout:
        pieces = pieces_of(tok)
        bin_by_id = pieces.coord_vocab.bin_by_id
        tokens = decode_response(token_ids, pieces)
        data = tokens.data
        start = data.find(_OPENING.encode())
        if start < 0:
            return without_container(tokens, pieces, _OPENING, truncated=data.endswith(b"["))
        body = start + len(_OPENING)
        lines = _read_lines(data, body)
        reader = _LineReader(tokens, [(i, bin_by_id[t]) for i, t in enumerate(tokens.ids) if t in bin_by_id])
        records = [record for run in lines.runs for record in reader.records(run)]
        drops = Counter(record.reason for record in records if isinstance(record, DroppedRecord))
        drops[DropReason.MALFORMED] += sum(run.start == run.stop and run.is_complete for run in lines.runs)
        prefix_stop = max((record.byte_span[1] for record in records), default=body)
        has_leading_text = bool(data[:start].strip(b" \t\n\r"))
        prefix = fallback_prefix(pieces, _OPENING) if has_leading_text else tokens.cut(prefix_stop, pieces)
        return ParsedRollout(
            objects=[record for record in records if isinstance(record, ParsedObject)],
            records=records,
            response_token_ids=tokens.ids,
            text=tokens.text,
            prefix_token_ids=prefix.ids,
            prefix_text=prefix.text,
            num_verbatim_prefix_tokens=0 if has_leading_text else num_verbatim_tokens(tokens, prefix_stop),
            invalid_rollout=False,
            leading_text=has_leading_text,
            truncated=not lines.is_closed,
            dropped_by_reason={reason: drops[reason] for reason in DropReason if drops[reason]},
            body=body,
        )

    def token_types(self, token_ids: Sequence[int], tok: Tokenizer) -> npt.NDArray[np.int8]:
        ids = list(map(int, token_ids))
        pieces = pieces_of(tok)
        types = np.full(len(ids), TokenType.STRUCT, dtype=np.int8)
        types[self.desc_token_positions(ids, tok)] = TokenType.DESC
        bin_by_id = pieces.coord_vocab.bin_by_id
        types[[i for i, token_id in enumerate(ids) if token_id in bin_by_id]] = TokenType.COORD
        types[[i for i, token_id in enumerate(ids) if token_id == pieces.im_end_id]] = TokenType.EOS
        return types

    def desc_token_positions(self, token_ids: Iterable[int], tok: Tokenizer) -> list[int]:
        pieces = pieces_of(tok)
        tokens = DecodedTokens.from_ids(pieces.before_im_end(token_ids), pieces)
        start = tokens.data.find(_OPENING.encode())
        runs = _read_lines(tokens.data, start + len(_OPENING)).runs if start >= 0 else []
        positions = {p for run in runs for p in range(*tokens.tokens_over(run.start, run.name_stop))}
        return sorted(positions)

    def strict_json(self, text: str) -> str | None:
        data = text.removesuffix("<|im_end|>").encode("utf-8", errors="replace")
        if not data.startswith(_OPENING.encode()):
            return None
        lines = _read_lines(data, len(_OPENING))
        records: list[dict[str, object]] = []
        for run in lines.runs:
            name, bins = _shared_name(data, run), _bins_in(data, run)
            if name is None or not bins:
                return None
            boxes = [bins[at : at + 4] for at in range(0, len(bins), 4)]
            records += [{"desc": name, "bbox_2d": box} for box in boxes]
        return json.dumps({"objects": records}, ensure_ascii=False) if lines.is_closed else None

    def bin_of_coord(self, text: str) -> int | None:
        return coord_token_bin(text)


def _runs_of(objects: Iterable[BoxObject]) -> Iterator[str]:
    """The lines of objects, one for those of one name that follow one another."""
    checked = []
    for index, obj in enumerate(objects):
        check_writable(index, obj)
        if obj.kind != KIND_BBOX:
            raise RecordError(
                f"object {index} (0-based, desc {obj.desc!r}) is a polygon, and the compact form writes boxes only; "
                "use custom.answer_format: coordjson"
            )
        checked.append(obj)
    for name, run in groupby(checked, key=lambda obj: obj.desc):
        yield _written(name) + "".join(coord_token(k) for obj in run for k in obj.bins)


def _bins_in(data: bytes, run: _Run) -> list[int]:
    return [int(match[1]) for match in _COORD.finditer(data, run.name_stop, run.coords_stop)]


def _shared_name(data: bytes, run: _Run) -> str | None:
    """The name of a line that holds whole boxes and nothing else, under which another box could stand."""
    num_coords = len(_bins_in(data, run))
    if run.stop != run.coords_stop or num_coords == 0 or num_coords % 4:
        return None
    name = _name_of(data[run.start : run.name_stop])
    return name if name is not None and name.strip() else None


class _LineReader:
    """Lines of one response as records, in their order.

    coords: position and bin of every coordinate token.
    """

    def __init__(self, tokens: DecodedTokens, coords: Sequence[tuple[int, int]]) -> None:
        self._tokens, self._data, self._locator = tokens, tokens.data, RecordLocator(tokens)
        self._positions = [position for position, _ in coords]
        self._bins = [k for _, k in coords]
        self._starts = [tokens.start_of(position) for position in self._positions]

    def records(self, run: _Run) -> list[ParsedObject | DroppedRecord]:
        """The boxes of a line, or the line as one dropped record; nothing of an empty one."""
        if run.start == run.stop:
            return []
        shown = [(m.start(), int(m[1])) for m in _COORD.finditer(self._data, run.name_stop, run.coords_stop)]
        if not run.is_complete and run.stop == run.coords_stop:
            shown = shown[: len(shown) // 4 * 4]  # a box that the text ends in is not complete
        elif not run.is_complete:
            return []
        if not run.is_complete and not shown:
            return []
        name = _name_of(self._data[run.start : run.name_stop])
        fault = _fault(run, name, len(shown))
        first = bisect_left(self._starts, run.name_stop)
        last = first + len(shown)
        if fault is None and shown != list(
            zip(self._starts[first:last], self._bins[first:last], strict=False)
        ):
            fault = DropReason.AMBIGUOUS
        if fault is not None:
            stop = run.stop if run.is_complete else shown[-1][0] + len(coord_token(shown[-1][1]))
            return [self._locator.locate(RecordReading(run.start, stop, fault))]
        assert name is not None
        return self._boxes(run, name, range(first, last, 4))

    def _boxes(self, run: _Run, name: str, firsts: Sequence[int]) -> list[ParsedObject | DroppedRecord]:
        """A record for each box; that of the first box holds the name. firsts: of the coordinates of each."""
        records: list[ParsedObject | DroppedRecord] = []
        desc_span = self._locator.char_at(run.start), self._locator.char_at(run.name_stop)
        for at in firsts:
            bins = tuple(self._bins[at : at + 4])
            start = run.start if at == firsts[0] else self._starts[at]
            stop = self._starts[at + 3] + len(coord_token(bins[3]))
            char = desc_span[0] if at == firsts[0] else desc_span[1] + start - run.name_stop
            span = char, desc_span[1] + stop - run.name_stop  # coordinates are ASCII
            token_span = self._tokens.tokens_over(start, stop)
            if bins[2] < bins[0] or bins[3] < bins[1]:
                records.append(DroppedRecord(DropReason.BBOX_INVALID, span, token_span, (start, stop)))
                continue
            records.append(
                ParsedObject(
                    name,
                    KIND_BBOX,
                    bins,
                    token_positions=tuple(self._positions[at : at + 4]),
                    span=span,
                    desc_span=desc_span,
                    token_span=token_span,
                    byte_span=(start, stop),
                    desc_token_span=self._tokens.tokens_over(run.start, run.name_stop),
                )
            )
        return records


def _fault(run: _Run, name: str | None, num_coords: int) -> DropReason | None:
    if name is None:
        return DropReason.MALFORMED
    if not name.strip():
        return DropReason.MISSING_DESC
    if run.name_stop == run.coords_stop:
        return DropReason.MISSING_GEOM
    if run.stop != run.coords_stop:
        return DropReason.NON_COORD_TOKEN
    return DropReason.WRONG_ARITY if num_coords % 4 else None
