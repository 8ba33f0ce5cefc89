"""Picture files that nobody can use, of every kind."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

SIZE = (64, 64)


def noise(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*SIZE, 3), dtype=np.uint8))


def encoded(picture: Image.Image, form: str) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, form)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(side: int = 20_000) -> bytes:
    """A PNG of a few bytes that says it has side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"\0") + chunk(b"IEND", b"")


def broken_inside(png: bytes) -> bytes:
    """Whole at both ends, with pixels that cannot be unpacked."""
    at = png.index(b"IDAT") + 60
    return png[:at] + bytes(200) + png[at + 200 :]


JPEG, PNG = encoded(noise(), "JPEG"), encoded(noise(), "PNG")
BAD = {
    "truncated.jpg": (JPEG[: len(JPEG) // 2], SIZE, "cannot be read: image file is truncated"),
    "text.jpg": (b"<html>404</html>", SIZE, "it is no picture"),
    "missing.jpg": (None, SIZE, "does not exist"),
    "empty.jpg": (b"", SIZE, "it is no picture"),
    "bomb.png": (huge_png(), (20_000, 20_000), "is too large"),
    "thin.png": (encoded(Image.new("RGB", (1, 300)), "PNG"), (1, 300), "an aspect ratio of 300"),
    "other_size.png": (PNG, (640, 480), "is 64 x 64 pixels, but width and height say 640 x 480"),
    "float.tiff": (encoded(Image.new("F", SIZE, 0.5), "TIFF"), SIZE, "32 bits a channel"),
    "broken.png": (broken_inside(PNG), SIZE, "broken.png cannot be read"),
}
"""Name -> (content, None for no file; size that a record says; what is said about it)."""
