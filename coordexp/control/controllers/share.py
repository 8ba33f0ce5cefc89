"""The channel schedule where a controller moves `b_ratio`: the same function of the accumulated share, with state.

With a fixed ratio, or points, the share before a step follows from its number (`control.schedule`). With a knob it is
what the steps so far have added up, and belongs to the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from coordexp.control.schedule import REALIZED_WINDOW, Channel


class AccumulatedShare:
    """Share of channel B that the steps so far have added up, exactly."""

    def __init__(self) -> None:
        self._total = Fraction(0)
        self._last = ""  # channels of the last steps

    def next_channel(self, ratio: float) -> Channel:
        """Channel of the coming step, which adds `ratio`: B iff the whole part of the share grows with it."""
        before, self._total = self._total, self._total + Fraction(ratio)
        channel = Channel.B if math.floor(self._total) > math.floor(before) else Channel.A
        self._last = (self._last + channel)[-REALIZED_WINDOW:]
        return channel

    def realized(self) -> float:
        """Share of channel-B steps among the last ones, the newest included."""
        return self._last.count(Channel.B) / len(self._last)

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"total": str(self._total), "last": self._last}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()` of another process."""
        self._total, self._last = Fraction(state["total"]), str(state["last"])
