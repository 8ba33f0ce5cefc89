"""What the model's image processor can take."""

from __future__ import annotations

MAX_ASPECT_RATIO = 200
"""Longer side / shorter side: the processors of the Qwen-VL family raise beyond it."""
MIN_PIXELS, MAX_PIXELS = 65_536, 16_777_216
"""Pictures of fewer or more pixels are scaled by Qwen3-VL's processor (its `size` as published)."""


def check_picture(width: int, height: int) -> str | None:
    """Why the model's processor cannot take a picture of that size; None where it can.

    Training and import refuse such a picture with these words: `image NAME {fault}`.
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
