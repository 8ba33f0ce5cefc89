"""The one reader of pictures: upright, as viewers show them, in three channels of 8 bits.

Training, rollouts, inference and the checks of data files all read through `open_picture`, so that a model sees the
same pixels everywhere, and `width` and `height` of a record mean the size that `open_picture` gives.

    EXIF or XMP orientation   applied
    transparency              laid on white
    16 bits a channel         the high byte
    32 bits a channel         refused: nothing says which values are black and white
    gray, palette, CMYK, ...  converted to RGB; colour profiles are not applied
    several frames            the first
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from coordexp.errors import RecordError

PictureSource = str | os.PathLike[str] | bytes
"""A file, or the bytes of one."""

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", "PPM")
"""Names of Pillow. Others are refused: some of their readers start other programs."""
MEDIA_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png"}
DECODER_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    RuntimeError,
    struct.error,
)
"""What Pillow's decoders raise on a broken file."""
MAX_ASPECT_RATIO = 200
"""Longer side / shorter side: the processors of the Qwen-VL family raise beyond it."""
MIN_PIXELS, MAX_PIXELS = 65_536, 16_777_216
"""Pictures of fewer or more pixels are scaled by Qwen3-VL's processor (its `size` as published)."""
_CLOSING = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG": b"IEND"}
"""How JPEG and PNG files begin, and what stands at their ends."""
_TAIL = 4096  # bytes at the end of a file in which that is looked for
_SIDEWAYS = (5, 6, 7, 8)
_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_PNG_START = 8  # bytes of its signature
_PNG_EXIF_TEXTS = (b"Raw profile type exif", b"XML:com.adobe.xmp")


@dataclass(frozen=True)
class PictureFacts:
    """What the header of a picture says.

    width, height: of the upright picture, in pixels.
    mode: Pillow's name for the stored channels, such as "RGB", "L", "P", "RGBA", "I;16".
    exif_orientation: 1 to 8; 1 where nothing is said.
    has_alpha: whether pixels can be transparent.
    bits: of a channel (of a palette: of its colours).
    """

    width: int
    height: int
    mode: str
    exif_orientation: int
    has_alpha: bool
    bits: int


def open_picture(source: PictureSource) -> Image.Image:
    """The whole picture, decoded: RGB and upright, without metadata.

    Raises:
        RecordError: there is no such file, it is no picture, it is cut off or broken, or its values have no range.
    """
    with _reading(source) as stored:
        return upright_rgb(stored, name=_name(source))


def picture_facts(source: PictureSource) -> PictureFacts:
    """What the header says; pixels are not decoded. Raises RecordError as `open_picture` does."""
    with _reading(source) as stored:
        mode, bits = stored.mode, _bits(stored)
        width, height = stored.size
        orientation = _orientation(stored, source)
        # Pillow turns TIFF files itself, and gives their upright size from the start.
        if orientation in _SIDEWAYS and not isinstance(stored, TiffImagePlugin.TiffImageFile):
            width, height = height, width
        return PictureFacts(width, height, mode, orientation, _has_alpha(stored), bits)


def looks_whole(path: str | os.PathLike[str]) -> bool:
    """Whether a JPEG or PNG file has its closing marker near its end; True for other formats. Nothing is decoded."""
    with _failures(os.fspath(path)), open(path, "rb") as stream:
        start = stream.read(4)
        closing = next((end for begin, end in _CLOSING.items() if start.startswith(begin)), None)
        if closing is None:
            return True
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL))
        return closing in stream.read()


def upright_rgb(picture: Image.Image, *, name: str = "the picture") -> Image.Image:
    """A picture that is open already, as `open_picture` gives it.

    name: what errors call it.
    """
    with _failures(name):
        upright = ImageOps.exif_transpose(picture)
        rgb = _rgb(upright, name)
    rgb.info = {}
    return rgb


def check_picture(width: int, height: int) -> str | None:
    """Why the model's image processor cannot take a picture of that size; None where it can.

    Whoever refuses such a picture says: `image NAME {fault}`.
    """
    if width < 1 or height < 1:
        return f"has {width} x {height} pixels: expected at least one of each"
    aspect = max(width, height) / min(width, height)
    if aspect > MAX_ASPECT_RATIO:
        return (
            f"is {width} x {height} pixels, an aspect ratio of {aspect:.0f}, and the model's processor takes at most "
            f"{MAX_ASPECT_RATIO}. Crop or pad it"
        )
    return None


def scaling(width: int, height: int) -> float:
    """By which factor the processor scales a picture's sides (apart from rounding to whole patches); 1 for not."""
    pixels = width * height
    limit = min(max(pixels, MIN_PIXELS), MAX_PIXELS)
    return float((limit / pixels) ** 0.5) if pixels else 1.0


def picture_bytes(
    source: PictureSource, *, fit: Callable[[Image.Image], Image.Image] | None = None
) -> tuple[bytes, str]:
    """(bytes of a file, media type) that any other reader decodes to the pixels of `open_picture`.

    The file itself where it is an upright JPEG or PNG in RGB; otherwise the picture as PNG.

    fit: gives the picture another size; it returns the very picture where the size is right.

    Raises RecordError as `open_picture` does.
    """
    with _reading(source) as stored:
        media_type = MEDIA_TYPES.get(stored.format or "")
        plain = stored.mode == "RGB" and _bits(stored) == 8 and not _has_alpha(stored)
        upright = upright_rgb(stored, name=_name(source))
        plain = plain and stored.getexif().get(ExifTags.Base.Orientation, 1) == 1
    picture = upright if fit is None else fit(upright)
    if media_type and plain and picture is upright:
        return file_bytes(source), media_type
    written = io.BytesIO()
    picture.save(written, "PNG", compress_level=1)
    return written.getvalue(), MEDIA_TYPES["PNG"]


def file_bytes(source: PictureSource) -> bytes:
    """The file as it is; RecordError when there is none."""
    with _failures(_name(source)), _stream(source) as stream:
        return stream.read()


def _name(source: PictureSource) -> str:
    if isinstance(source, bytes):
        return f"the picture ({len(source)} bytes)"
    return os.fspath(source)


def _stream(source: PictureSource) -> IO[bytes]:
    return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")


@contextmanager
def _reading(source: PictureSource) -> Iterator[Image.Image]:
    name = _name(source)
    with _failures(name), _stream(source) as stream, Image.open(stream, formats=FORMATS) as stored:
        yield stored


@contextmanager
def _failures(name: str) -> Iterator[None]:
    """Whatever a decoder says about a broken file becomes a RecordError."""
    try:
        yield
    except FileNotFoundError:
        raise RecordError(f"image {name} does not exist. Check its path.") from None
    except UnidentifiedImageError:
        raise RecordError(
            f"image {name} cannot be read: it is no picture; expected one of {', '.join(FORMATS)}."
        ) from None
    except Image.DecompressionBombError as error:
        raise RecordError(f"image {name} is too large: {error}. Scale it down.") from error
    except DECODER_ERRORS as error:
        raise RecordError(
            f"image {name} cannot be read: {error or type(error).__name__}. Is the file complete?"
        ) from error


def _rgb(picture: Image.Image, name: str) -> Image.Image:
    if picture.mode in ("I", "F"):
        raise RecordError(
            f"image {name} has 32 bits a channel (mode {picture.mode}), and nothing says which values are black and "
            "white. Save it with 8 or 16 bits a channel."
        )
    if picture.mode.startswith("I;16"):
        if "transparency" in picture.info:
            raise RecordError(
                f"image {name} has 16 bits of gray, one of them transparent. Save it with 8 bits or without "
                "transparency."
            )
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if _has_alpha(picture):
        with_alpha = picture.convert("RGBA")
        white = Image.new("RGB", picture.size, (255, 255, 255))
        white.paste(with_alpha, mask=with_alpha.getchannel("A"))
        return white
    return picture.convert("RGB")


def _has_alpha(picture: Image.Image) -> bool:
    return picture.mode in _WITH_ALPHA or "transparency" in picture.info


def _bits(stored: Image.Image) -> int:
    """Bits of a stored channel; of files whose header is read and no more."""
    if stored.mode in ("I", "F"):
        return 32
    if stored.mode == "1":
        return 1
    raw_modes = [str(tile[3]) for tile in getattr(stored, "tile", ())]
    return 16 if any(";16" in text for text in (stored.mode, *raw_modes)) else 8


def _orientation(stored: Image.Image, source: PictureSource) -> int:
    if isinstance(stored, PngImagePlugin.PngImageFile):
        # PngImageFile.getexif decodes the whole picture, since the chunk may come after the pixels.
        exif = Image.Image.getexif(stored)
        if ExifTags.Base.Orientation not in exif:
            with _stream(source) as stream:
                late = _has_late_exif(stream)
            if late:
                with _stream(source) as stream, Image.open(stream, formats=FORMATS) as again:
                    exif = again.getexif()
    else:
        exif = stored.getexif()
    orientation = exif.get(ExifTags.Base.Orientation, 1)
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _has_late_exif(stream: IO[bytes]) -> bool:
    """Does a PNG file hold EXIF or XMP after its pixels?"""
    stream.seek(_PNG_START)
    seen_pixels = False
    while len(head := stream.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        start = stream.tell()
        if seen_pixels and kind == b"eXIf":
            return True
        if seen_pixels and kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword = stream.read(min(length, 32)).split(b"\0")[0]
            if keyword in _PNG_EXIF_TEXTS:
                return True
        seen_pixels |= kind == b"IDAT"
        stream.seek(start + length + 4)
    return False
