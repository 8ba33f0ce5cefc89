"""Ten photographs of ten sizes and kinds of file, each with a dark mark at known pixels.

The pictures are scikit-learn's two (`sklearn.datasets.load_sample_images`), read from the installed package.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

XYXY = tuple[int, int, int, int]


class Kind(NamedTuple):
    """How a photograph is stored. width, height: of the upright picture.  orientation: EXIF."""

    name: str
    mode: str
    width: int
    height: int
    orientation: int = 1


KINDS = (
    Kind("rgb.jpg", "RGB", 640, 427), Kind("rgba.png", "RGBA", 321, 251), Kind("gray.jpg", "L", 203, 333),
    Kind("gray_alpha.png", "LA", 155, 151), Kind("palette.png", "P", 299, 97), Kind("sixteen.png", "I;16", 210, 145),
    Kind("cmyk.jpg", "CMYK", 257, 255), Kind("turned.jpg", "RGB", 213, 320, 6), Kind("tiny.png", "RGB", 30, 23),
    Kind("large.jpg", "RGB", 1919, 1279),
)  # fmt: skip


def write_photograph(folder: Path, kind: Kind) -> XYXY:
    """Write it; returns the mark's box in pixels of the upright picture, ends inclusive."""
    from sklearn.datasets import load_sample_images

    number = KINDS.index(kind)
    source = Image.fromarray(load_sample_images().images[number % 2])
    picture = source.resize((kind.width, kind.height), Image.Resampling.LANCZOS)
    bright = 175 + np.asarray(picture, dtype=np.int64) * 80 // 255  # what is dark in it is the mark alone
    left, top = kind.width * (1 + number % 5) // 10, kind.height * (6 - number % 5) // 10
    right, bottom = left + kind.width * 3 // 10, top + kind.height * 3 // 10
    bright[top:bottom, left:right] = 0
    made = _stored(Image.fromarray(bright.astype(np.uint8)), kind.mode, (left, top, right, bottom))
    if kind.orientation == 6:
        made = made.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = kind.orientation
    made.save(folder / kind.name, exif=exif, **({"quality": 95} if kind.name.endswith(".jpg") else {}))
    return left, top, right - 1, bottom - 1


def _stored(picture: Image.Image, mode: str, mark: XYXY) -> Image.Image:
    """In a mode; of those with alpha, what lies around the mark is half transparent."""
    if mode == "I;16":
        return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    if mode == "P":
        return picture.quantize(64)
    if mode in ("RGBA", "LA"):
        left, top, right, bottom = mark
        alpha = np.full((picture.height, picture.width), 128, np.uint8)
        alpha[top:bottom, left:right] = 255
        made = picture.convert(mode.removesuffix("A"))
        made.putalpha(Image.fromarray(alpha))
        return made
    return picture.convert(mode)
