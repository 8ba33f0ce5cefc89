"""How an answer in JSON is laid out: what it opens and closes with, its keys, and how its coordinates are written.

COORDJSON  {"objects": [{"desc": "cat", "bbox_2d": [<|coord_12|>, <|coord_40|>, <|coord_310|>, <|coord_402|>]}]}
NUMBERS    {"objects": [{"desc": "cat", "bbox_2d": [12, 40, 310, 402]}]}       numbers are the bins themselves
QWEN       [{"bbox_2d": [12, 40, 310, 402], "label": "cat"}]                   Qwen3-VL's own form, 0..1000

Qwen3-VL writes n for the place n / 1000 of a side, a bin k stands for k / 999. Bin k is written as round(1000 k / 999),
which is k up to 499 and k + 1 from 500 on, and n is read as bin round(999 n / 1000): every bin comes back as it was.
500, which no bin is written as, is read as bin 500.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordexp.codec.schema import CONTAINER_CLOSE, CONTAINER_OPEN, NUM_BINS

_MAX_BIN = NUM_BINS - 1


@dataclass(frozen=True, slots=True)
class Scale:
    """Whole numbers 0..most from one end of a side to the other."""

    most: int

    def number_of(self, bin_index: int) -> int:
        """The number that is nearest to a bin."""
        return (2 * self.most * bin_index + _MAX_BIN) // (2 * _MAX_BIN)

    def bin_of(self, number: int) -> int | None:
        """The bin that is nearest to a number (of two, the higher); None for one that is not on the scale."""
        if not 0 <= number <= self.most:
            return None
        return (2 * _MAX_BIN * number + self.most) // (2 * self.most)

    def bin_of_text(self, text: str | bytes) -> int | None:
        """The bin of a number written without sign, fraction and leading zeros; None for any other text."""
        if (
            not text.isdigit()
            or not text.isascii()
            or len(text) > 4
            or (len(text) > 1 and int(text[:1]) == 0)
        ):
            return None
        return self.bin_of(int(text))


@dataclass(frozen=True, slots=True)
class JsonLayout:
    """One layout. scale: of written numbers; None where coordinates are coordinate tokens."""

    opening: str = CONTAINER_OPEN
    closing: str = CONTAINER_CLOSE
    desc_key: str = "desc"
    scale: Scale | None = None

    @property
    def is_array(self) -> bool:
        """The container is the array alone, and not the value of a key."""
        return self.opening == "["


COORDJSON = JsonLayout()
NUMBERS = JsonLayout(scale=Scale(_MAX_BIN))
QWEN = JsonLayout(opening="[", closing="]", desc_key="label", scale=Scale(1000))
