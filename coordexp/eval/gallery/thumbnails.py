"""Pictures inside a page: some as large as a page shows them, the others as small as their number asks for.

However many there are, thumbnails stay below `THUMBNAIL_BYTES` of the page in all: each has its share, and gets the
largest size that fits into it.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from coordexp.errors import RecordError
from coordexp.eval.gallery.cards import SMALL_PICTURE
from coordexp.pictures import open_picture

LARGE_SIDE, LARGE_BYTES = 640, 120_000
"""Longer side of a large picture in pixels, and its most bytes."""
THUMBNAIL_SIDE, THUMBNAIL_BYTES = 320, 16_000_000
"""Longer side of a thumbnail, and the bytes that all of them together take in the page."""
CROP_SIDE, CROP_BYTES = 200, 12_000
_LEAST_SIDE, _SHRINK = 32, 0.8
_QUALITY = 60


def data_uri(content: bytes, media_type: str) -> str:
    """The content as a URI that needs no fetching."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def embedded(paths: Sequence[Path | None], large: Sequence[bool]) -> list[str | None]:
    """Each picture as a data URI, None where there is no readable picture.

    large: which are as large as the page shows them; the others share `THUMBNAIL_BYTES`.
    """
    num_small = max(1, len(paths) - sum(large))
    share = THUMBNAIL_BYTES * 3 // 4 // num_small  # base64 makes four characters of three bytes

    def embed(path: Path | None, is_large: bool) -> str | None:
        if path is None:
            return None
        try:
            picture = open_picture(path)
        except RecordError:
            return None
        return (
            shrunk(picture, LARGE_SIDE, LARGE_BYTES) if is_large else shrunk(picture, THUMBNAIL_SIDE, share)
        )

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(embed, paths, large))


def shrunk(picture: Image.Image, side: int, most_bytes: int) -> str:
    """A picture as a data URI of at most `most_bytes` bytes (before base64) unless that is below 32 pixels."""
    if max(picture.size) <= min(side, SMALL_PICTURE):  # a drawing of a few pixels: every one, if that fits
        content = _encoded(picture, lossless=True)
        if len(content) <= most_bytes:
            return data_uri(content, "image/webp")
    size = float(min(side, max(picture.size)))
    while True:
        smaller = picture.copy()
        smaller.thumbnail((max(1, int(size)), max(1, int(size))), Image.Resampling.LANCZOS)
        content = _encoded(smaller, quality=_QUALITY if most_bytes < LARGE_BYTES else 80)
        if len(content) <= most_bytes or size <= _LEAST_SIDE:
            return data_uri(content, "image/webp")
        size = max(_LEAST_SIDE, min(size * _SHRINK, size * (most_bytes / len(content)) ** 0.5 * 1.05))


class Crop(NamedTuple):
    """A box with its surroundings. source: a data URI.  width, height: of the crop in pixels;  box_xywh: in it."""

    source: str
    width: int
    height: int
    box_xywh: tuple[float, float, float, float]


def cropped(path: Path, box_xyxy: Sequence[float], side: int = CROP_SIDE) -> Crop | None:
    """The box and half its longer side all around; None where there is no readable picture, or no part of the box."""
    try:
        picture = open_picture(path)
    except RecordError:
        return None
    x1, y1, x2, y2 = box_xyxy
    margin = max(x2 - x1, y2 - y1, 16.0) / 2
    left, top = max(0, int(x1 - margin)), max(0, int(y1 - margin))
    right, bottom = min(picture.width, int(x2 + margin) + 1), min(picture.height, int(y2 + margin) + 1)
    if right <= left or bottom <= top:
        return None
    source = shrunk(picture.crop((left, top, right, bottom)), side, CROP_BYTES)
    return Crop(source, right - left, bottom - top, (x1 - left, y1 - top, x2 - x1, y2 - y1))


def _encoded(picture: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "WEBP", method=4, **options)
    return stream.getvalue()
