"""Which ranks are dead, hang or hold up the others, by what each said last. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from coordexp.telemetry.life.beats import FAILED, RankBeat

DEAD_AFTER_S = 60.0
"""A process that has said nothing for so long is gone (it speaks every ten seconds)."""
STRAGGLER, STRAGGLER_S = 1.5, 0.05
"""A rank that is busy so many times as long as the median rank, and so many seconds longer, holds up the others."""


def broken(beats: Sequence[RankBeat]) -> list[RankBeat]:
    """Ranks that said how they broke off, the first one first."""
    return sorted((beat for beat in beats if beat.end and beat.end.how == FAILED), key=lambda beat: beat.time)


def dead(beats: Sequence[RankBeat], now: float) -> list[RankBeat]:
    """Ranks that are silent without having said that they end."""
    return [beat for beat in beats if beat.end is None and now - beat.time > DEAD_AFTER_S]


def hanging(beats: Sequence[RankBeat], now: float, patience_s: float) -> list[RankBeat]:
    """Of living ranks that finish no step for longer than `patience_s` the ones that are furthest behind.

    An evaluation may take as long as it takes.
    """
    alive = [beat for beat in beats if beat.end is None and now - beat.time <= DEAD_AFTER_S]
    stuck = [beat for beat in alive if beat.doing == "training" and now - beat.step_time > patience_s]
    if not alive or len(stuck) < len(alive):
        return []
    last = min(beat.step for beat in stuck)
    return [beat for beat in stuck if beat.step == last]


def stragglers(beats: Sequence[RankBeat]) -> list[tuple[RankBeat, float]]:
    """Ranks that the others wait for, each with the seconds of a step that the median rank is busy."""
    busy = {beat.rank: beat.busy_s for beat in beats if beat.busy_s is not None}
    if len(busy) < 2:
        return []
    usual = median(busy.values()) if len(busy) > 2 else min(busy.values())
    late = [
        beat
        for beat in beats
        if beat.busy_s is not None and beat.busy_s > STRAGGLER * usual and beat.busy_s - usual > STRAGGLER_S
    ]
    return [(beat, usual) for beat in late]


def missing(beats: Sequence[RankBeat]) -> list[int]:
    """Ranks that never said anything."""
    expected = max((beat.world_size for beat in beats), default=0)
    return sorted(set(range(expected)) - {beat.rank for beat in beats})


def name_of(beat: RankBeat) -> str:
    """`rank 3 (host, process 123)`."""
    return f"rank {beat.rank} ({beat.host}, process {beat.pid})"
