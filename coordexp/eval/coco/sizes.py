"""COCO's size classes, by the area of an object."""

from __future__ import annotations

import numpy as np

from coordexp.geometry import FloatArray, IntArray

SIZES = ("small", "medium", "large")
_BOUNDS = (32.0**2, 96.0**2)  # square pixels, where they meet


def size_classes(area_M: FloatArray) -> IntArray:
    """The place among `SIZES` of each area (square pixels); a bound belongs to the larger class.  int64 [M]"""
    return np.searchsorted(_BOUNDS, area_M, side="right")
