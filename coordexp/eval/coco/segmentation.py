"""Outlines and run-length masks: recognised, checked and clipped before anything is drawn.

A segmentation is one of

- outlines: a list of parts, each a flat list x, y, x, y, ... (one part alone, and points as pairs, are understood too);
- run lengths: `{"size": [height, width], "counts": ...}`, counts as a list of lengths or as COCO's packed text.

pycocotools trusts what it is given: a vertex far outside makes it take all memory, and a run length that does not
fill the picture gives wrong overlaps. So an outline is cut to the picture and bounded in length, and run lengths have
to have the picture's size and sum, before it sees them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from coordexp.errors import RecordError
from coordexp.eval.coco.fields import MAX_COORDINATE, parse_number, shown
from coordexp.geometry import FloatArray, IntArray

MAX_OUTLINE = 2_000_000
"""Pixels around all parts of one object: the drawing takes memory by it (about 200 bytes a pixel)."""
MAX_MASK_PIXELS = 2**29
"""height x width of a mask: what a run length of `_MAX_PACKED_DIGITS` can hold."""

_PACKED_FIRST, _PACKED_LAST = 48, 48 + 63
_MAX_PACKED_DIGITS = 6
"""5 bits each, the last with a sign."""


def is_run_length(segmentation: Any) -> bool:
    """Whether a segmentation is run lengths (an object), not outlines (a list)."""
    return isinstance(segmentation, Mapping)


def read_outlines(segmentation: Any, where: str) -> list[FloatArray]:
    """The parts of an outline, each float64 [V, 2] with V >= 3 points in pixels; empty parts are left out.

    Raises RecordError for a part of fewer than 3 points or an odd number of values, and for a value that is no finite
    number.
    """
    if not isinstance(segmentation, (list, tuple)):
        raise RecordError(
            f"{where} is {shown(segmentation)}: expected outlines (a list) or run lengths (an object)"
        )
    parts = _parts(segmentation)
    if parts is None:
        raise RecordError(f"{where} is {shown(segmentation)}: expected a list of outlines x, y, x, y, ...")
    return [_part(part, where if len(parts) == 1 else f"{where}, part {index}") for index, part in parts]


def outline_box(segmentation: Any, width: int, height: int, where: str) -> list[float]:
    """x, y, width, height around a segmentation, cut to the picture (0 x 0 where its size is not known).

    Raises RecordError as `read_outlines` and `to_mask`, and for a segmentation without any part.
    """
    if is_run_length(segmentation):
        box: list[float] = coco_mask.toBbox(to_mask(segmentation, width, height, where)).tolist()
        return box
    parts = read_outlines(segmentation, where)
    if not parts:
        raise RecordError(f"{where} is {shown(segmentation)}: expected an outline")
    inside = [clip_outline(part, (0, 0), (width, height)) for part in parts] if width and height else []
    points = np.concatenate([part for part in inside if len(part)] or parts)
    low, high = points.min(axis=0), points.max(axis=0)
    return [float(v) for v in (*low, *(high - low))]


def to_mask(segmentation: Any, width: int, height: int, where: str) -> dict[str, Any]:
    """A segmentation as a packed run-length mask of pycocotools, `{"size": [height, width], "counts": bytes}`.

    What lies outside the picture covers nothing. Outlines that reach further than a picture's size beyond it are cut
    there; nearer ones are drawn as they are, pixel for pixel as pycocotools does.
    Raises RecordError for a segmentation that is none, for run lengths of another size or sum than the picture's, and
    for outlines that are too long to draw.
    """
    if width < 1 or height < 1:
        raise RecordError(f"{where}: the image has no width and height, which masks need")
    if width * height > MAX_MASK_PIXELS:
        raise RecordError(f"{where}: the image has {width} x {height} pixels, more than a mask can have")
    if is_run_length(segmentation):
        return _checked_run_length(segmentation, width, height, where)
    low, high = (-width, -height), (2 * width, 2 * height)
    parts = [clip_outline(part, low, high) for part in read_outlines(segmentation, where)]
    return _drawn([part for part in parts if len(part) >= 3], width, height, where)


def clip_outline(
    points_V2: FloatArray, low_xy: tuple[float, float], high_xy: tuple[float, float]
) -> FloatArray:
    """The part of an outline inside a rectangle (Sutherland and Hodgman).

    An outline wholly inside is returned as it is, one wholly outside with no points.  [V, 2] -> float64 [W, 2].
    """
    if (points_V2 >= low_xy).all() and (points_V2 <= high_xy).all():
        return points_V2
    points = points_V2
    for axis in (0, 1):
        points = _clip_side(points, axis, 1.0, float(low_xy[axis]))
        points = _clip_side(points, axis, -1.0, float(high_xy[axis]))
    return points


def run_lengths(counts: Any, where: str) -> IntArray:
    """The lengths of alternating runs, background first, of a list or of COCO's packed text.  int64 [R].

    Raises RecordError for counts that are neither, or negative.
    """
    if isinstance(counts, (str, bytes)):
        return _unpacked(counts, where)
    if isinstance(counts, (list, tuple)):
        values = _as_floats(counts)
        if ((values >= 0) & (values <= MAX_MASK_PIXELS) & (values == np.floor(values))).all():
            return values.astype(np.int64)
    raise RecordError(f"{where}.counts is {shown(counts)}: expected run lengths, whole numbers of at least 0")


def _checked_run_length(
    segmentation: Mapping[str, Any], width: int, height: int, where: str
) -> dict[str, Any]:
    size = segmentation.get("size")
    numbers = [parse_number(v) for v in size] if isinstance(size, (list, tuple)) else []
    if numbers != [height, width]:
        raise RecordError(
            f"{where}.size is {shown(size)}: expected the size of the image, [{height}, {width}] (height, width)"
        )
    counts = segmentation.get("counts")
    lengths = run_lengths(counts, where)
    total = int(lengths.sum())
    if total != height * width:
        raise RecordError(
            f"{where}.counts add up to {total}: expected height x width of the image, {height} x {width} = "
            f"{height * width}"
        )
    if isinstance(counts, str):
        return {"size": [height, width], "counts": counts.encode("ascii")}
    if isinstance(counts, bytes):
        return {"size": [height, width], "counts": counts}
    mask: dict[str, Any] = coco_mask.frPyObjects(
        {"size": [height, width], "counts": lengths.tolist()}, height, width
    )
    return mask


def _drawn(parts: Sequence[FloatArray], width: int, height: int, where: str) -> dict[str, Any]:
    length = sum(float(np.abs(part - np.roll(part, 1, axis=0)).max(axis=1).sum()) for part in parts)
    if length > MAX_OUTLINE:
        raise RecordError(
            f"{where} is an outline of {length:.0f} pixels around: expected at most {MAX_OUTLINE} (a picture of "
            f"{width} x {height} has {2 * (width + height)})"
        )
    if not parts:
        empty: dict[str, Any] = coco_mask.frPyObjects(
            {"size": [height, width], "counts": [height * width]}, height, width
        )
        return empty
    drawn: dict[str, Any] = coco_mask.merge(
        coco_mask.frPyObjects([part.reshape(-1).tolist() for part in parts], height, width)
    )
    return drawn


def _parts(segmentation: Sequence[Any]) -> list[tuple[int, Sequence[Any]]] | None:
    """(index, values) of the parts that hold anything, whatever way the list is nested; None for no such list."""
    if not any(isinstance(part, (list, tuple)) for part in segmentation):
        return [(0, segmentation)] if segmentation else []
    if not all(isinstance(part, (list, tuple)) for part in segmentation):
        return None
    if len(segmentation) >= 3 and all(len(part) == 2 and not _is_nested(part) for part in segmentation):
        return [(0, segmentation)]  # one outline, written as points
    return [(index, part) for index, part in enumerate(segmentation) if part]


def _part(part: Sequence[Any], where: str) -> FloatArray:
    """Points of one part, given flat or as pairs."""
    flat: Sequence[Any] = part
    if _is_nested(part):
        if not all(isinstance(point, (list, tuple)) and len(point) == 2 for point in part):
            raise RecordError(f"{where} is {shown(part)}: expected an outline x, y, x, y, ...")
        flat = list(chain.from_iterable(part))
    values = _floats(flat, where)
    if len(values) % 2:
        raise RecordError(
            f"{where} has {len(values)} values: expected an outline x, y, x, y, ..., an even number"
        )
    if len(values) < 6:
        raise RecordError(
            f"{where} has {len(values) // 2} points ({shown(part)}): expected an outline of at least 3"
        )
    return values.reshape(-1, 2)


def _floats(flat: Sequence[Any], where: str) -> FloatArray:
    values = _as_floats(flat)
    fine = np.abs(values) <= MAX_COORDINATE
    if not fine.all():
        fault = int(np.argmin(fine))
        raise RecordError(f"{where}: value {fault} is {shown(flat[fault])}: expected a finite pixel position")
    return values


def _as_floats(flat: Sequence[Any]) -> FloatArray:
    """float64 of numbers, or of text that is one; NaN for anything else."""
    if set(map(type, flat)) <= {int, float}:
        try:
            return np.array(flat, dtype=np.float64)
        except OverflowError:  # an int of hundreds of digits
            pass
    return np.array([np.nan if (v := parse_number(item)) is None else v for item in flat], dtype=np.float64)


def _is_nested(part: Sequence[Any]) -> bool:
    return any(isinstance(value, (list, tuple, dict)) for value in part)


def _clip_side(points_V2: FloatArray, axis: int, sign: float, bound: float) -> FloatArray:
    """Keep what lies on the side of `bound` that `sign` points to; edges that cross are cut there."""
    if not len(points_V2):
        return points_V2
    ahead = np.roll(points_V2, -1, axis=0)
    depth, depth_ahead = sign * (points_V2[:, axis] - bound), sign * (ahead[:, axis] - bound)
    inside, inside_ahead = depth >= 0, depth_ahead >= 0
    crosses = inside != inside_ahead
    share = np.divide(depth, depth - depth_ahead, out=np.zeros_like(depth), where=crosses)
    cut = points_V2 + share[:, None] * (ahead - points_V2)
    cut[:, axis] = bound  # exactly
    both = np.stack([points_V2, cut], axis=1)
    kept: FloatArray = both[np.stack([inside, crosses], axis=1)]
    return kept


def _unpacked(counts: str | bytes, where: str) -> IntArray:
    """Run lengths of packed text: 5 bits a character, from the fourth on as differences to the last of its kind."""
    try:
        codes = np.frombuffer(counts.encode("ascii") if isinstance(counts, str) else counts, dtype=np.uint8)
    except UnicodeEncodeError:
        codes = np.zeros(1, dtype=np.uint8)
    if not len(codes) or not ((codes >= _PACKED_FIRST) & (codes <= _PACKED_LAST)).all():
        raise RecordError(
            f"{where}.counts is {shown(counts)}: expected packed run lengths (characters '0' to 'o')"
        )
    digits = codes.astype(np.int64) - _PACKED_FIRST
    last = (digits & 0x20) == 0
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else np.zeros(0, dtype=np.int64)
    num_digits = ends - starts + 1
    if not last[-1] or num_digits.max() > _MAX_PACKED_DIGITS:
        raise RecordError(
            f"{where}.counts is {shown(counts)}: expected packed run lengths, and this is cut or broken"
        )
    shift = 5 * (np.arange(len(digits)) - np.repeat(starts, num_digits))
    lengths = np.add.reduceat((digits & 0x1F) << shift, starts)
    lengths -= np.where(digits[ends] & 0x10, 1 << (5 * num_digits), 0)
    lengths[1::2] = np.cumsum(lengths[1::2])
    lengths[2::2] = np.cumsum(lengths[2::2])
    if (lengths < 0).any():
        raise RecordError(f"{where}.counts is {shown(counts)}: expected run lengths of at least 0")
    return lengths
