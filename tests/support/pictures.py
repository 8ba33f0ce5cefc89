"""Picture files of the kinds that readers disagree about."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 128, 64  # multiples of the patches of Qwen3-VL models: no engine resizes
PICTURES = (
    "plain.png", "plain.jpg", "turned.jpg", "mirrored.jpg", "turned.png", "transparent.png", "gray_alpha.png",
    "palette.png", "sixteen_bits.png",
)  # fmt: skip
"""What `write_picture` can write; turned: EXIF orientation 6, mirrored: 5."""


def marked_scene() -> Image.Image:
    """A gradient with a mark of 16 x 16 pixels in the stored picture's upper left corner."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([x, 2 * y, x + y], axis=-1).astype(np.uint8)
    pixels[:16, :16] = (255, 0, 0)
    return Image.fromarray(pixels)


def write_picture(folder: Path, name: str) -> Path:
    """One of `PICTURES` in `folder`."""
    path, exif = folder / name, Image.Exif()
    kind = name.partition(".")[0]
    exif[0x0112] = {"turned": 6, "mirrored": 5}.get(kind, 1)
    alpha = Image.fromarray(np.tile(np.arange(WIDTH, dtype=np.uint8) * 2, (HEIGHT, 1)))
    if kind == "transparent":
        picture = marked_scene()
        picture.putalpha(alpha)
    elif kind == "gray_alpha":
        picture = marked_scene().convert("L")
        picture.putalpha(alpha)
    elif kind == "sixteen_bits":
        picture = Image.fromarray(np.asarray(marked_scene().convert("L")).astype(np.uint16) * 257)
    elif kind == "palette":
        picture = marked_scene().quantize(16)
        picture.info["transparency"] = 3
    else:
        picture = marked_scene()
    picture.save(path, exif=exif)
    return path
