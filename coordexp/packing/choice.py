"""Which buffered segments go into the next pack.

A segment is one encoded sample and stays whole; a pack holds at most `capacity` tokens. Segments wait in a
buffer in the order they arrived, and the oldest always leaves with the next pack, so none can starve.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence

from binpacking.to_constant_volume import to_constant_volume

from coordexp.errors import ContractError


def select_segments(lengths: Sequence[int], capacity: int) -> list[int]:
    """Choose the segments of the next pack: the fullest of several ways to fill it, the oldest included.

    The ways are first-in-first-out (in order of arrival, each segment that still fits), and every bin that
    `binpacking` forms of the younger segments in the room beside the oldest, topped up first-in-first-out. So
    a pack is never filled worse than first-in-first-out, and nothing that was left behind would still fit.
    Equally full packs: fewer segments win, then the smaller indices. Only the arguments decide.

    lengths: token counts >= 1 in order of arrival, the oldest first.  capacity: tokens a pack can hold.
    Returns ascending indices into `lengths`, 0 among them, of at most `capacity` tokens; [] for no lengths.
    Raises ContractError naming a segment that is longer than `capacity`.
    """
    lengths = [operator.index(length) for length in lengths]
    for index, length in enumerate(lengths):
        if length < 1:
            raise ContractError(f"segment {index} has length {length}: expected at least 1 token")
        if length > capacity:
            raise ContractError(
                f"segment {index} has {length} tokens but a pack holds {capacity}: raise the packing length "
                "(global_max_length), or lower max_new_tokens or the image size so that samples are shorter"
            )
    if not lengths:
        return []
    starts = ([0], *_bins_around_the_oldest(lengths, capacity))
    packs = [_earliest_twins(_topped_up(start, lengths, capacity), lengths) for start in starts]
    return min(packs, key=lambda pack: (-sum(lengths[index] for index in pack), len(pack), pack))


def plan_packs(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Spread segments over packs, the next pack always by `select_segments`.

    lengths: token counts in order of arrival.  Returns indices into `lengths`, each in exactly one pack.
    Raises ContractError for a segment longer than `capacity`.
    """
    waiting = list(range(len(lengths)))
    packs: list[list[int]] = []
    while waiting:
        chosen = select_segments([lengths[index] for index in waiting], capacity)
        packs.append([waiting[place] for place in chosen])
        waiting = [index for place, index in enumerate(waiting) if place not in set(chosen)]
    return packs


def _topped_up(start: list[int], lengths: Sequence[int], capacity: int) -> list[int]:
    """`start` and, in order of arrival, every other segment that still fits.  Ascending."""
    pack = set(start)
    room = capacity - sum(lengths[index] for index in start)
    for index, length in enumerate(lengths):
        if index not in pack and length <= room:
            pack.add(index)
            room -= length
    return sorted(pack)


def _earliest_twins(pack: list[int], lengths: Sequence[int]) -> list[int]:
    """The same lengths, each taken from the earliest segments that have it.  Ascending."""
    wanted = Counter(lengths[index] for index in pack)
    chosen = []
    for index, length in enumerate(lengths):
        if wanted[length] > 0:
            wanted[length] -= 1
            chosen.append(index)
    return chosen


def _bins_around_the_oldest(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    room = capacity - lengths[0]
    fitting = {index: length for index, length in enumerate(lengths) if index > 0 and length <= room}
    return [[0, *younger] for younger in to_constant_volume(fitting, room)]
