"""From which data set each sample of a run comes, from the sample's number alone.

    schedule = MixSchedule.of([7, 3])
    schedule.at(n)          # (which data set, how many of its samples came before)

Shares are exact fractions of the weights. After any number n of samples a data set with share w has given more than
n w - 1 and fewer than n w + 1 of them: its j-th sample (from 0) must come after floor(j / w) others at the earliest
and before ceil((j + 1) / w) are shown, and of those that may come the one that must come first does. Such a schedule
always exists (proportionate fairness on one processor: Baruah, Cohen, Plaxton, Varvel 1996), and repeats itself after
the common denominator of the shares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
import numpy.typing as npt

FINEST = 1_000_000
"""Shares with a larger common denominator are rounded to whole numbers of this."""

Ints = npt.NDArray[np.int32]


def parts_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Samples of each data set in one round of the schedule: shares over their common denominator.

    The shares are exact where that is at most FINEST; else each is off by less than 1 / FINEST.
    Raises ValueError for a weight that is not positive, or too small to be given one sample in FINEST.
    """
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"weights {list(weights)}: expected numbers above 0")
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    round_length = math.lcm(*(share.denominator for share in shares))
    if round_length <= FINEST:
        return tuple(int(share * round_length) for share in shares)
    floors = [int(share * FINEST) for share in shares]
    by_rest = sorted(range(len(shares)), key=lambda i: floors[i] - shares[i] * FINEST)
    for i in by_rest[: FINEST - sum(floors)]:
        floors[i] += 1
    if not all(floors):
        raise ValueError(
            f"weights {list(weights)}: the smallest is less than a millionth of all; leave that data set out"
        )
    common = math.gcd(*floors)
    return tuple(floor // common for floor in floors)


@dataclass(frozen=True, eq=False)
class MixSchedule:
    """parts: samples of each data set in one round.

    which_L: int32 [L], the data set at each place of a round.  before_L: int32 [L], samples of it before that place.
    places: of each data set, int32, the places at which it comes.
    """

    parts: tuple[int, ...]
    which_L: Ints
    before_L: Ints
    places: tuple[Ints, ...]

    @classmethod
    def of(cls, weights: Sequence[float]) -> MixSchedule:
        """The schedule of data sets with these weights. Raises ValueError as `parts_of`."""
        return _schedule(parts_of(weights))

    @property
    def round_length(self) -> int:
        """L."""
        return len(self.which_L)

    def at(self, number: int) -> tuple[int, int]:
        """The data set of a sample (numbers from 0), and how many samples of it came before."""
        rounds, place = divmod(number, self.round_length)
        which = int(self.which_L[place])
        return which, rounds * self.parts[which] + int(self.before_L[place])

    def length_until(self, which: int, num_samples: int) -> int:
        """Samples of all data sets until one of them has given `num_samples` (at least 1), that one included."""
        rounds, last = divmod(num_samples - 1, self.parts[which])
        return rounds * self.round_length + int(self.places[which][last]) + 1


@lru_cache(maxsize=8)
def _schedule(parts: tuple[int, ...]) -> MixSchedule:
    which_L = _one_round(parts)
    before_L = np.empty_like(which_L)
    places = tuple(np.flatnonzero(which_L == i).astype(np.int32) for i in range(len(parts)))
    for found in places:
        before_L[found] = np.arange(len(found), dtype=np.int32)
    return MixSchedule(parts, which_L, before_L, places)


def _one_round(parts: tuple[int, ...]) -> Ints:
    """Earliest deadline first, among those whose time has come; of equal ones the first."""
    length = sum(parts)
    which_L = np.empty(length, dtype=np.int32)
    release = [0] * len(parts)  # of the next sample of each: its place at the earliest
    deadline = [-(-length // part) for part in parts]  # and the place before which it must come
    given = [0] * len(parts)
    everyone = range(len(parts))
    for place in range(length):
        which = min((deadline[i], i) for i in everyone if release[i] <= place)[1]
        which_L[place] = which
        given[which] += 1
        done, part = given[which], parts[which]
        release[which] = done * length // part
        deadline[which] = -(-(done + 1) * length // part)
    return which_L
