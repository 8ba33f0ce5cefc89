"""Random numbers of one sample at one turn: the same on every machine, whatever was drawn before."""

from __future__ import annotations

import hashlib

import numpy as np


class Draws:
    """what: of the sample and its turn, all that the numbers depend on."""

    def __init__(self, *what: object) -> None:
        digest = hashlib.sha256(repr(what).encode()).digest()
        self._generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return float(self._generator.random()) < probability

    def between(self, low: float, high: float) -> float:
        """Evenly from [low, high]."""
        return low + (high - low) * float(self._generator.random())

    def below(self, number: int) -> int:
        """A whole number from 0 to number - 1."""
        return int(self._generator.random() * number)
