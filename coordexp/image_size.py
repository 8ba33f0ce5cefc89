"""How large a picture enters the model: the size rule of Qwen-VL, and the limits that a checkpoint carries.

A picture is scaled to sides that are multiples of `factor` (a visual token is `factor` x `factor` pixels), to no more
than `max_pixels` and no fewer than `min_pixels`. Training, rollouts, inference and the client of a server scale by
these limits before any processor sees the picture, so that all of them give the model the same pixels. The limits
stand in the processor's configuration of every checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from coordexp.errors import ConfigError, RecordError
from coordexp.files import read_json

MAX_ASPECT_RATIO = 200
"""Qwen-VL's processors take no picture that is longer than this many times its width."""

_ROUNDS = 4  # of extreme shapes the rule has to be applied again until nothing changes


@dataclass(frozen=True)
class PixelLimits:
    """Limits of a picture's area, in pixels, and the side of a visual token.

    Raises ConfigError unless 0 < min_pixels <= max_pixels, with room for one token.
    """

    min_pixels: int
    max_pixels: int
    factor: int

    def __post_init__(self) -> None:
        if not 0 < self.min_pixels <= self.max_pixels or self.max_pixels < self.factor**2:
            raise ConfigError(
                f"min_pixels is {self.min_pixels} and max_pixels {self.max_pixels}: expected 0 < min_pixels <= "
                f"max_pixels, and max_pixels at least the {self.factor**2} of one visual token"
            )

    @classmethod
    def of_folder(cls, folder: Path) -> PixelLimits:
        """The limits in the processor's configuration of a model folder; ConfigError where there are none."""
        for name, section in (
            ("processor_config.json", "image_processor"),
            ("preprocessor_config.json", None),
        ):
            path = folder / name
            if not path.is_file():
                continue
            settings = read_json(path, error=ConfigError)
            settings = settings.get(section) if section else settings
            if isinstance(settings, Mapping):
                return cls.of_settings(settings, where=str(path))
        raise ConfigError(
            f"{folder}: neither processor_config.json nor preprocessor_config.json there says how images are prepared; "
            "copy the processor's files from the base model"
        )

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any], *, where: str) -> PixelLimits:
        """The limits in the settings of an image processor, under either of the names they have had."""
        size = settings.get("size") or {}
        least = settings.get("min_pixels") or size.get("shortest_edge")
        most = settings.get("max_pixels") or size.get("longest_edge")
        patch, merge = settings.get("patch_size"), settings.get("merge_size")
        found = [value for value in (least, most, patch, merge) if isinstance(value, int) and value > 0]
        if len(found) < 4:
            raise ConfigError(
                f"{where}: expected size.shortest_edge, size.longest_edge, patch_size and merge_size of a Qwen-VL "
                f"image processor, found {size}, {patch} and {merge}"
            )
        return cls(found[0], found[1], found[2] * found[3])

    def within(self, *, min_pixels: int | None = None, max_pixels: int | None = None) -> PixelLimits:
        """These limits with others in their place; None keeps one."""
        return replace(
            self, min_pixels=min_pixels or self.min_pixels, max_pixels=max_pixels or self.max_pixels
        )

    def fitted(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) in pixels of a picture as the model sees it.

        Raises RecordError for one that is more than 200 times as long as it is wide.
        """
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise RecordError(
                f"{width} x {height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other, which the "
                "model's processor refuses; crop the picture or leave it out"
            )
        size = (width, height)
        for _ in range(_ROUNDS):
            once = self._scaled(*size)
            if once == size:
                return size
            size = once
        return self._nearest(width, height) or size

    def _nearest(self, width: int, height: int) -> tuple[int, int] | None:
        """Of all sizes within the limits the one of most like shape; None where the limits leave none.

        Needed where they lie close together: the rule then scales up and down by turns, and another processor that
        applies it once more would see another picture.
        """
        factor, found = self.factor, []
        for wide in range(factor, self.max_pixels // factor + 1, factor):
            fewest = math.ceil(self.min_pixels / (wide * factor))
            most = self.max_pixels // (wide * factor)
            steps = wide * height / width / factor
            for rows in {math.floor(steps), math.ceil(steps)} if fewest <= most else ():
                high = min(max(rows, fewest), most) * factor
                found.append((abs(math.log(wide * height / (high * width))), wide, high))
        return min(found)[1:] if found else None

    def _scaled(self, width: int, height: int) -> tuple[int, int]:
        factor = self.factor
        wide, high = round(width / factor) * factor, round(height / factor) * factor
        if wide * high > self.max_pixels:
            shrink = math.sqrt(width * height / self.max_pixels)
            wide = max(factor, math.floor(width / shrink / factor) * factor)
            high = max(factor, math.floor(height / shrink / factor) * factor)
        elif wide * high < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (width * height))
            wide = math.ceil(width * grow / factor) * factor
            high = math.ceil(height * grow / factor) * factor
        return wide, high

    def num_tokens(self, width: int, height: int) -> int:
        """Visual tokens of a picture of that size."""
        wide, high = self.fitted(width, height)
        return wide * high // self.factor**2

    def cap_for(self, num_tokens: int) -> int | None:
        """The largest max_pixels that gives no picture more than so many visual tokens; None where there is none."""
        cap = num_tokens * self.factor**2
        return cap if cap >= self.min_pixels else None

    def fit(self, picture: Image.Image) -> Image.Image:
        """The picture in the size the model sees."""
        size = self.fitted(*picture.size)
        return picture if size == picture.size else picture.resize(size, Image.Resampling.BICUBIC)
