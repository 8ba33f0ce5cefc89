"""The JSONL data contract: one image with its objects per line, coordinates as bins 0..999.

    {"images": ["a.jpg"], "width": 640, "height": 480,
     "objects": [{"desc": "cat", "bbox_2d": [10, 20, 300, 400]}]}

Optional keys: `classes` (what the picture is asked for: a list of names, among which are those of all its objects),
`summary` (text) and `metadata` (an object). Bins may also be written `"<|coord_10|>"`.
Descriptions are read in Unicode's form NFC.
Every error names the file, the line (1-based), the object index (0-based) where one is at fault, what was
found, what was expected and what to do.
"""

from __future__ import annotations

import difflib
import json
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

from coordexp.codec.coord_vocab import coord_token_bin
from coordexp.codec.descs import canonical_desc
from coordexp.codec.schema import (
    GEOMETRY_KINDS,
    KIND_BBOX,
    KIND_POLY,
    NUM_BINS,
    BoxObject,
    bins_fault,
    is_blank,
)
from coordexp.errors import ConfigError, RecordError
from coordexp.pictures import check_picture, looks_whole, open_picture, picture_facts

OBJECT_ORDERINGS = ("sorted", "random")

_REQUIRED_KEYS = ("images", "width", "height", "objects")
_RECORD_KEYS = (*_REQUIRED_KEYS, "classes", "summary", "metadata")
_MAX_SIDE = 2**31 - 1
_OBJECT_KEYS = ("desc", *GEOMETRY_KINDS, "poly_points")


@dataclass(frozen=True)
class Record:
    """One line of a data file.

    images: paths as written, relative to the folder of `file`.
    width, height: pixels of the upright picture (`coordexp.pictures`), which the bins refer to.
    classes: names that the picture is asked for, where a prompt says `{classes}`; None: no such list.
    file, line: where the record was read (line is 1-based); None when it did not come from a file.
    """

    images: tuple[str, ...]
    width: int
    height: int
    objects: tuple[BoxObject, ...]
    summary: str | None = None
    metadata: Mapping[str, Any] | None = None
    file: str | None = None
    line: int | None = None
    classes: tuple[str, ...] | None = None

    def image_paths(self) -> tuple[Path, ...]:
        """Image paths resolved against the folder of the data file (absolute ones stay as they are)."""
        folder = Path(self.file).parent if self.file else Path()
        return tuple(folder / image for image in self.images)


def read_jsonl(path: str | PathLike[str], *, require_images: bool = False) -> list[Record]:
    """All records of a data file; see `iter_jsonl`."""
    return list(iter_jsonl(path, require_images=require_images))


def iter_jsonl(path: str | PathLike[str], *, require_images: bool = False) -> Iterator[Record]:
    """Records of a data file one by one; blank lines are skipped.

    require_images: also raise when an image file does not exist or has another size than the record says.
    Raises RecordError at the first line that breaks the contract, or when the file cannot be read.
    """
    file = str(path)
    try:
        with open(path, "rb") as stream:
            for line, raw in enumerate(stream, start=1):
                record = parse_line(raw, file=file, line=line)
                if record is None:
                    continue
                if require_images:
                    check_images(record)
                yield record
    except OSError as error:
        raise RecordError(
            f"{file}: cannot be read ({error.strerror}). Check the path of the data file"
        ) from error


def parse_line(raw: bytes, *, file: str, line: int) -> Record | None:
    """Check one line of a data file; None for a blank one. Raises as `parse_record`."""
    if not raw.strip():
        return None
    return parse_record(_decode_utf8(raw, file, line), file=file, line=line)


def parse_record(
    source: str | Mapping[str, Any], *, file: str | PathLike[str] | None = None, line: int | None = None
) -> Record:
    """Check one record, given as a JSON line or as the decoded object.

    file, line: named in errors and kept in the Record. Raises RecordError for any breach of the contract.
    """
    where = _Place(str(file) if file is not None else None, line)
    obj = _decode_json(source, where) if isinstance(source, str) else source
    if not isinstance(obj, Mapping):
        where.fail(
            f"the line holds {_type_name(obj)}, expected a JSON object with {', '.join(_REQUIRED_KEYS)}"
        )
    _check_keys(obj, where)
    objects = _objects(obj["objects"], where)
    return Record(
        images=_images(obj["images"], where),
        width=_size(obj, "width", where),
        height=_size(obj, "height", where),
        objects=objects,
        summary=_summary(obj.get("summary"), where),
        metadata=_metadata(obj.get("metadata"), where),
        file=where.file,
        line=line,
        classes=_classes(obj.get("classes"), objects, where),
    )


def dataset_name(record: Record) -> str:
    """`metadata.dataset` of the record; without it the name of the folder that holds the data file.

    `lvis` for data/lvis/train.jsonl. Raises RecordError when metadata.dataset is no text.
    """
    name = (record.metadata or {}).get("dataset")
    if name is None:
        return _folder_name(record.file) if record.file else ""
    if not isinstance(name, str) or not name.strip():
        raise RecordError(
            f"{record.file}:{record.line}: metadata.dataset is {name!r}, expected the dataset's name as text "
            "(or leave it out)"
        )
    return name


@lru_cache(maxsize=64)
def _folder_name(file: str) -> str:
    return Path(file).resolve().parent.name


def order_objects(objects: Sequence[BoxObject], ordering: str = "sorted", seed: int = 0) -> list[BoxObject]:
    """Objects in the order they are written.

    sorted: by (min y, min x) of their bins, ties in the given order.
    random: shuffled, the same for the same seed.
    Raises ConfigError for any other ordering.
    """
    if ordering == "sorted":
        return sorted(objects, key=lambda obj: (min(obj.bins[1::2]), min(obj.bins[0::2])))
    if ordering == "random":
        shuffled = list(objects)
        random.Random(seed).shuffle(shuffled)
        return shuffled
    raise ConfigError(
        f"custom.object_ordering is {ordering!r}, expected one of {', '.join(OBJECT_ORDERINGS)}"
    )


@dataclass(frozen=True)
class _Place:
    """Where in the data we are, for error messages."""

    file: str | None
    line: int | None
    object_index: int | None = None

    def fail(self, message: str) -> NoReturn:
        raise RecordError(f"{self}: {message}")

    def __str__(self) -> str:
        place = self.file or "record"
        if self.line is not None:
            place += f":{self.line}" if self.file else f" (line {self.line})"
        if self.object_index is not None:
            place += f": object {self.object_index} (0-based)"
        return place


def _decode_utf8(raw: bytes, file: str, line: int) -> str:
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        _Place(file, line).fail(
            f"is not UTF-8 ({error.reason} at byte {error.start}). Save the file as UTF-8"
        )


def _decode_json(text: str, where: _Place) -> Any:
    def refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        unique = dict(pairs)
        if len(unique) < len(pairs):
            repeated = next(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)
            where.fail(f"key {repeated!r} is written more than once in one object. Keep one of them")
        return unique

    def refuse_constant(name: str) -> NoReturn:
        where.fail(f"holds {name}, which is not JSON. Write a number")

    try:
        return json.loads(text, object_pairs_hook=refuse_repeated_keys, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        cut = "; the line may be truncated" if error.pos >= len(text.rstrip()) - 1 else ""
        where.fail(
            f"is not one line of JSON ({error.msg} at column {error.colno}{cut}). Write one object per line"
        )
    except (ValueError, RecursionError) as error:
        where.fail(f"is not readable JSON ({error}). Write one object per line")


def _check_keys(obj: Mapping[str, Any], where: _Place) -> None:
    for key in obj:
        if key not in _RECORD_KEYS:
            where.fail(
                f"unknown key {key!r}{_nearest(key, _RECORD_KEYS)}; known keys: {', '.join(_RECORD_KEYS)}"
            )
    for key in _REQUIRED_KEYS:
        if key not in obj:
            where.fail(f"key {key!r} is missing; required keys: {', '.join(_REQUIRED_KEYS)}")


def _images(value: Any, where: _Place) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        where.fail(f"images is {_shown(value)}, expected a non-empty list of paths relative to the data file")
    for index, image in enumerate(value):
        if not isinstance(image, str) or not image.strip():
            where.fail(f"images[{index}] is {_shown(image)}, expected a path relative to the data file")
        _check_unicode(image, f"images[{index}]", where)
    return tuple(value)


def _size(obj: Mapping[str, Any], key: str, where: _Place) -> int:
    value = obj[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MAX_SIDE:
        where.fail(f"{key} is {_shown(value)}, expected an int > 0 (pixels of the image file)")
    return value


def _summary(value: Any, where: _Place) -> str | None:
    if value is not None and not isinstance(value, str):
        where.fail(f"summary is {_shown(value)}, expected text (or leave the key out)")
    if value is not None:
        _check_unicode(value, "summary", where)
    return value


def _classes(value: Any, objects: Sequence[BoxObject], where: _Place) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not value:
        where.fail(f"classes is {_shown(value)}, expected a list of names (or leave the key out)")
    for index, name in enumerate(value):
        if not isinstance(name, str) or is_blank(name):
            where.fail(f"classes[{index}] is {_shown(name)}, expected a name with something to read")
        _check_unicode(name, f"classes[{index}]", where)
    names = tuple(canonical_desc(name) for name in value)
    if len(set(names)) < len(names):
        repeated = next(name for name, number in Counter(names).items() if number > 1)
        where.fail(f"classes names {repeated!r} more than once. Keep one of them")
    known = set(names)
    for index, obj in enumerate(objects):
        if canonical_desc(obj.desc) not in known:
            _Place(where.file, where.line, index).fail(
                f"desc {_shown(obj.desc)} is not among the {len(names)} classes that the picture is asked for"
                f"{_nearest(obj.desc, names)}. Name it there, or leave the object out"
            )
    return names


def _metadata(value: Any, where: _Place) -> Mapping[str, Any] | None:
    if value is not None and not isinstance(value, Mapping):
        where.fail(f"metadata is {_shown(value)}, expected a JSON object (or leave the key out)")
    return value


def _check_unicode(text: str, name: str, where: _Place) -> None:
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        where.fail(
            f"{name} {_shown(text)} holds half of a surrogate pair, which is no character. Correct the text"
        )


def _objects(value: Any, where: _Place) -> tuple[BoxObject, ...]:
    if not isinstance(value, (list, tuple)):
        where.fail(f"objects is {_shown(value)}, expected a list (empty for an image without objects)")
    return tuple(_object(obj, _Place(where.file, where.line, index)) for index, obj in enumerate(value))


def _object(obj: Any, where: _Place) -> BoxObject:
    if not isinstance(obj, Mapping):
        where.fail(f"is {_shown(obj)}, expected a JSON object with desc and one geometry")
    kind = _geometry_kind(obj, where)
    desc = obj.get("desc")
    if not isinstance(desc, str) or is_blank(desc):
        found = f"is {_shown(desc)}" if "desc" in obj else "is missing"
        where.fail(f"desc {found}, expected a description with something to read")
    _check_unicode(desc, "desc", where)
    bins = _bins(obj[kind], kind, where)
    if kind == KIND_BBOX:
        _check_box_extent(bins, where)
    _check_poly_points(obj, kind, bins, where)
    return BoxObject(desc, kind, bins)


def _geometry_kind(obj: Mapping[str, Any], where: _Place) -> str:
    for key in obj:
        if key not in _OBJECT_KEYS:
            where.fail(
                f"unknown key {key!r}{_nearest(key, _OBJECT_KEYS)}; an object holds desc and exactly one "
                f"geometry: {KIND_BBOX} (4 bins) or {KIND_POLY} (an even count of at least 6 bins)"
            )
    kinds = [kind for kind in GEOMETRY_KINDS if kind in obj]
    if not kinds:
        where.fail(f"no geometry: expected exactly one of {', '.join(GEOMETRY_KINDS)}")
    if len(kinds) > 1:
        where.fail(f"two geometries ({' and '.join(kinds)}): keep exactly one")
    return kinds[0]


def _bins(value: Any, kind: str, where: _Place) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)):
        where.fail(f"{kind} is {_shown(value)}, expected a list of bins")
    bins = [
        _bin_from_token(item, index, kind, where) if isinstance(item, str) else item
        for index, item in enumerate(value)
    ]
    fault = bins_fault(kind, bins)
    if fault:
        where.fail(fault + _frame_hint(bins))
    return tuple(bins)


def _bin_from_token(text: str, index: int, kind: str, where: _Place) -> int:
    bin_index = coord_token_bin(text)
    if bin_index is None:
        where.fail(
            f'{kind}[{index}] is {text!r}, expected an int or "<|coord_k|>" with k in 0..{NUM_BINS - 1}'
        )
    return bin_index


def _frame_hint(values: Sequence[Any]) -> str:
    """What coordinate frame faulty values seem to be in, and how to get bins from it; empty when unclear."""
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if not numbers or len(numbers) != len(values):
        return ""
    if any(isinstance(v, float) for v in numbers) and all(0 <= v <= 1 for v in numbers):
        return f". The values look normalised to [0, 1]: write bins, round({NUM_BINS - 1} * value)"
    if max(numbers) >= NUM_BINS:
        return (
            f". The values look like pixels: write bins, round({NUM_BINS - 1} * x / max(1, width - 1)), "
            "y with height, clamped to 0..999"
        )
    return ""


def _check_box_extent(bins: tuple[int, ...], where: _Place) -> None:
    x1, y1, x2, y2 = bins
    for axis, low, high in (("x", x1, x2), ("y", y1, y2)):
        if high < low:
            where.fail(
                f"{KIND_BBOX} {list(bins)} has {axis}2 < {axis}1 ({high} < {low}), expected x1, y1, x2, y2 "
                "with x1 < x2 and y1 < y2. Swap the corners, or convert from x, y, width, height"
            )
        if high == low:
            where.fail(
                f"{KIND_BBOX} {list(bins)} has no extent in {axis} ({axis}1 = {axis}2 = {low}), expected "
                f"{axis}1 < {axis}2. Widen it to one bin or leave the object out"
            )


def _check_poly_points(obj: Mapping[str, Any], kind: str, bins: tuple[int, ...], where: _Place) -> None:
    if "poly_points" not in obj:
        return
    count = obj["poly_points"]
    if kind != KIND_POLY:
        where.fail(f"poly_points stands beside {kind}; it belongs to {KIND_POLY}. Remove it")
    if isinstance(count, bool) or not isinstance(count, int) or count != len(bins) // 2:
        where.fail(f"poly_points is {_shown(count)}, but {KIND_POLY} has {len(bins) // 2} points")


def check_images(record: Record) -> None:
    """Every image exists and is whole; the first has the size that width and height say, and one that models take.

    Headers are read; a file that lacks its end is decoded. Raises RecordError naming file and line of the record.
    """
    where = _Place(record.file, record.line)
    paths = record.image_paths()
    for path in paths:
        if not os.path.isfile(path):
            where.fail(f"image {path} does not exist. Paths are relative to the folder of the data file")
    path = paths[0]
    try:
        facts = picture_facts(path)
        for cut_off in (other for other in paths if not looks_whole(other)):
            open_picture(cut_off)
    except RecordError as error:
        where.fail(str(error).removesuffix("."))
    size = facts.width, facts.height
    if size != (record.width, record.height):
        where.fail(
            f"image {path} is {size[0]} x {size[1]} pixels, but width and height say {record.width} x {record.height}. "
            "Bins refer to the size in the record; write the size of the upright picture that is trained on"
        )
    fault = check_picture(*size)
    if fault is not None:
        where.fail(f"image {path} {fault}")


def _nearest(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(key), known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def _shown(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
