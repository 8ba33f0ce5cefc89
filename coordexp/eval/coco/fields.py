"""Reading one key of many annotation entries at once: numbers, flags and ids, whole columns first.

A column whose values are of the plain types is read by numpy in one go. Only a column that holds something else is
looked at entry by entry: `null` is absent, a number written as text is read when it is one completely, and the first
value that is neither is an error naming entry, key, what was found and what was expected.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Integral, Real
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from coordexp.codec.descs import canonical_desc
from coordexp.errors import RecordError
from coordexp.geometry import FloatArray

Id = int | str
"""What images and categories are called in a file."""

MAX_COORDINATE = 1e9
"""Pixels; beyond it a value is no place in a picture (and its square no area that a float64 can compare)."""

_TEXT_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_MAX_NUMBER_LENGTH = 60
_NO = {"0", "0.0", "false", "f", "no", "n", "none", "null", ""}
_YES = {"1", "1.0", "true", "t", "yes", "y"}
_MAX_WHOLE_FLOAT = 2.0**53

_shown = reprlib.Repr()
_shown.maxlevel, _shown.maxlist, _shown.maxdict, _shown.maxstring, _shown.maxother = 3, 8, 4, 80, 80


def shown(value: object) -> str:
    """A value as an error message shows it: short, whatever it is."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"a number of some {int(value.bit_length() * math.log10(2))} digits"
    return _shown.repr(value)


@dataclass(frozen=True)
class EntryPlace:
    """Which list of a file entries come from, for error messages.

    name: of the list, such as "annotations".  entries: the list itself, whose `id` is named beside the index.
    """

    name: str
    entries: Sequence[Any]

    def entry(self, index: int, key: str = "") -> str:
        """`annotations[3].bbox (id 17)`."""
        found = self.entries[index]
        entry_id = found.get("id") if isinstance(found, Mapping) else None
        suffix = "" if entry_id is None or key == "id" else f" (id {shown(entry_id)})"
        return f"{self.name}[{index}]{'.' if key else ''}{key}{suffix}"

    def fail(self, index: int, key: str, value: object, expected: str) -> NoReturn:
        """The one form of an error about a value."""
        raise RecordError(f"{self.entry(index, key)} is {shown(value)}: expected {expected}")

    def lacks(self, index: int, key: str, expected: str) -> NoReturn:
        """The one form of an error about a value that is not there."""
        raise RecordError(f"{self.entry(index)} has no {key}{self.keys(index)}: expected {expected}")

    def keys(self, index: int) -> str:
        """The keys that an entry has, to be said of one that lacks a key: " (it has id, box)"."""
        found = [shown(key)[1:-1] for key in self.entries[index]][:12]
        return f" (it has {', '.join(found)})" if found else ""


def check_entries(value: Any, name: str) -> Sequence[Mapping[str, Any]]:
    """`value` as a list of JSON objects; RecordError naming the list or the entry that is none."""
    if not isinstance(value, (list, tuple)):
        raise RecordError(f"{name} is {shown(value)}: expected a list")
    if all_objects(value):
        return value
    for index, entry in enumerate(value):
        if not isinstance(entry, Mapping):
            raise RecordError(f"{name}[{index}] is {shown(entry)}: expected an object")
    return value


def all_objects(entries: Sequence[Any]) -> bool:
    """Whether every entry is a JSON object."""
    return set(map(type, entries)) <= {dict} or all(isinstance(entry, Mapping) for entry in entries)


def check_keys(place: EntryPlace, keys: Iterable[str]) -> None:
    """RecordError for an entry that has one of the keys in another spelling (isCrowd, image-id), and not in this one.

    It would be read as if the value were absent.
    """
    plain = {_plain_key(key): key for key in keys}
    written = set(chain.from_iterable(place.entries))
    others = {
        key: right for key in written if (right := plain.get(_plain_key(key))) is not None and right != key
    }
    for index, entry in enumerate(place.entries if others else ()):
        for key, right in others.items():
            if key in entry and right not in entry:
                raise RecordError(f"{place.entry(index)} has {shown(key)}: expected the key {right}")


def _plain_key(key: str) -> str:
    return "".join(character for character in key.lower() if character not in "_- ")


def column(entries: Iterable[Mapping[str, Any]], key: str) -> list[Any]:
    """The values of a key; None where it is absent."""
    return [entry.get(key) for entry in entries]


def read_numbers(
    values: Sequence[Any],
    place: EntryPlace,
    key: str,
    expected: str,
    *,
    low: float = -MAX_COORDINATE,
    high: float = MAX_COORDINATE,
) -> FloatArray:
    """float64 [M] of a column; NaN where the value is null or absent.

    Raises RecordError for a value that is no finite number in [low, high].
    """
    found = _plain_floats(values)
    if found is None:
        found = np.array([math.nan if v is None else _number(v) for v in values], dtype=np.float64)
        absent = np.fromiter((v is None for v in values), dtype=bool, count=len(values))
    else:
        absent = np.zeros(len(values), dtype=bool)
    fault = first(~absent & ~((found >= low) & (found <= high)))
    if fault is not None:
        place.fail(fault, key, values[fault], expected)
    return found


def read_boxes(values: Sequence[Any], place: EntryPlace, key: str = "bbox") -> FloatArray:
    """float64 [M, 4] of a column of x, y, width, height; a row of NaN where it is null, absent or an empty list.

    Raises RecordError for anything but 4 finite numbers with width and height of at least 0.
    """
    boxes = _plain_boxes(values)
    if boxes is None:
        boxes = np.array([_box(v) for v in values], dtype=np.float64).reshape(-1, 4)
        absent = np.fromiter((is_absent(v) for v in values), dtype=bool, count=len(values))
    else:
        absent = np.zeros(len(values), dtype=bool)
    fine = (np.abs(boxes) <= MAX_COORDINATE).all(axis=1) & (boxes[:, 2:] >= 0).all(axis=1)
    fault = first(~absent & ~fine)
    if fault is not None:
        place.fail(
            fault,
            key,
            values[fault],
            "4 finite pixel values (x, y, width >= 0, height >= 0)" + _box_hint(boxes[fault]),
        )
    return boxes


def is_absent(value: Any) -> bool:
    """Whether a geometry is not there: null, or the empty list of tools that write no null."""
    return value is None or (isinstance(value, (list, tuple, dict)) and not value)


def present(geometries: list[Any]) -> list[Any]:
    """The same column with None for every geometry that is not there."""
    if geometries.count(None) == len(geometries) or all(geometries):
        return geometries
    return [None if is_absent(value) else value for value in geometries]


def read_flags(values: Sequence[Any], place: EntryPlace, key: str) -> NDArray[np.bool_]:
    """bool [M] of a column of yes and no in any spelling; False where it is null or absent."""
    kinds = set(map(type, values))
    if kinds <= {int, bool, type(None)} and set(values) <= {0, 1, None}:
        return np.fromiter(map(bool, values), dtype=bool, count=len(values))
    flags = np.zeros(len(values), dtype=bool)
    for index, value in enumerate(values):
        flag = _flag(value)
        if flag is None:
            place.fail(index, key, value, "0 or 1")
        flags[index] = flag
    return flags


def read_ids(values: Sequence[Any], place: EntryPlace, key: str, *, what: str) -> list[Id]:
    """The ids of a column: whole numbers of any size, or text. 3.0 is 3.

    what: whose ids, for the message. Raises RecordError for null, absent and anything else.
    """
    if set(map(type, values)) <= {int} and _are_short(values):
        return list(values)
    ids: list[Id] = []
    for index, value in enumerate(values):
        found = _id(value)
        if found is None and value is None:
            place.lacks(index, key, f"{what}, a whole number or text")
        if found is None:
            place.fail(index, key, value, f"{what}, a whole number or text")
        ids.append(found)
    return ids


def read_names(values: Sequence[Any], place: EntryPlace, key: str, expected: str) -> list[str]:
    """The texts of a column as descriptions: in Unicode's composed form (NFC), without blanks around; "" where absent.

    Numbers are read as their digits (classes named 0, 1, 2). Raises RecordError for anything else, and for text that
    UTF-8 cannot hold.
    """
    texts = []
    for index, value in enumerate(values):
        if isinstance(value, int) and not isinstance(value, bool) and _are_short([value]):
            value = str(value)
        texts.append(_text(value, index, place, key, expected))
    return list(map(canonical_desc, texts))


def read_texts(values: Sequence[Any], place: EntryPlace, key: str, expected: str) -> list[str]:
    """The texts of a column as they are; "" where absent. Raises RecordError for anything else, as `read_names`."""
    return [_text(value, index, place, key, expected) for index, value in enumerate(values)]


def is_writable(text: str) -> bool:
    """Whether text can be written as UTF-8: half of a surrogate pair cannot."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def id_order(value: Id) -> tuple[bool, int, str]:
    """Sorting key of ids: numbers by size, then text by its letters."""
    return (True, 0, value) if isinstance(value, str) else (False, value, "")


def rows_of(
    ids: Sequence[Id], known: Sequence[Id], place: EntryPlace, key: str, kind: str
) -> NDArray[np.int64]:
    """int64 [M]: at which row of `known` each id stands.

    kind: what `known` is the ids of ("images").  Raises RecordError for the first id that is not there, saying so
    where one side has text and the other numbers.
    """
    row_of = {known_id: row for row, known_id in enumerate(known)}
    try:
        return np.fromiter(map(row_of.__getitem__, ids), dtype=np.int64, count=len(ids))
    except KeyError:
        pass
    fault = next(index for index, found in enumerate(ids) if found not in row_of)
    raise RecordError(
        f"{place.entry(fault, key)} is {shown(ids[fault])}{_stranger(ids, fault, row_of, kind)}"
    )


def check_unique(ids: Sequence[Id], place: EntryPlace) -> None:
    """RecordError naming the entry that repeats the id of another."""
    if len(set(ids)) == len(ids):
        return
    seen: set[Id] = set()
    for index, found in enumerate(ids):
        if found in seen:
            raise RecordError(f"{place.name}[{index}] repeats id {shown(found)}: ids must be unique")
        seen.add(found)


def first(faults_M: NDArray[np.bool_]) -> int | None:
    """Index of the first True, None without any."""
    return int(np.argmax(faults_M)) if faults_M.any() else None


def parse_number(value: Any) -> float | None:
    """A number, or text that is one completely; None for anything else."""
    found = _number(value)
    return None if math.isnan(found) else found


def _text(value: Any, index: int, place: EntryPlace, key: str, expected: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or not is_writable(value):
        place.fail(index, key, value, expected)
    return value


def _stranger(ids: Sequence[Id], fault: int, known: Mapping[Id, int], kind: str) -> str:
    """What is wrong with an id that nothing has."""
    text = f", not one of the {len(known)} {kind}"
    num_strangers = sum(found not in known for found in ids)
    if num_strangers > 1:
        text += f" ({num_strangers} of {len(ids)} entries name others)"
    if {type(known_id) for known_id in known} == {int if isinstance(ids[fault], str) else str}:
        found, other = ("text", "numbers") if isinstance(ids[fault], str) else ("a number", "text")
        example = shown(next(iter(known)))
        return f"{text}: it is {found}, while those are {other} (such as {example}). Write both the same way"
    return text


def _plain_floats(values: Sequence[Any]) -> FloatArray | None:
    """A column of ints and floats as an array, None for any other."""
    if not set(map(type, values)) <= {int, float}:
        return None
    try:
        return np.array(values, dtype=np.float64)
    except OverflowError:  # an int of hundreds of digits
        return None


def _plain_boxes(values: Sequence[Any]) -> FloatArray | None:
    if not set(map(type, values)) <= {list, tuple} or not set(map(len, values)) <= {4}:
        return None
    flat = _plain_floats(list(chain.from_iterable(values)))
    return None if flat is None else flat.reshape(-1, 4)


def _box(value: Any) -> list[float]:
    nothing = [math.nan] * 4
    if not isinstance(value, (list, tuple)) and not isinstance(value, np.ndarray):
        return nothing
    return [_number(v) for v in value] if len(value) == 4 else nothing


def _box_hint(box: FloatArray) -> str:
    if np.isfinite(box).all() and (box[2:] < 0).any():
        return ". Are the corners swapped?"
    return ""


def _number(value: Any) -> float:
    """The value as a float, NaN when it is no number and infinite when it is too large for one."""
    if isinstance(value, str):
        text = value.strip()
        return float(text) if len(text) <= _MAX_NUMBER_LENGTH and _TEXT_NUMBER.fullmatch(text) else math.nan
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _flag(value: Any) -> bool | None:
    if value is None or isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, str):
        text = value.strip().lower()
        return True if text in _YES else False if text in _NO else None
    return bool(value) if isinstance(value, Real) and value in (0, 1) else None


def _are_short(whole_numbers: Sequence[int]) -> bool:
    """Whether ids have at most some 77 digits."""
    return not whole_numbers or max(abs(min(whole_numbers)), max(whole_numbers)) < 1 << 256


def _id(value: Any) -> Id | None:
    if isinstance(value, (bool, np.bool_)):
        return None
    if isinstance(value, str):
        return value if is_writable(value) else None
    if isinstance(value, Integral):
        whole = int(value)
        return whole if _are_short([whole]) else None
    number = _number(value)
    return int(number) if abs(number) <= _MAX_WHOLE_FLOAT and number.is_integer() else None
