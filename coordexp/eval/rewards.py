"""How good one answer is, as numbers in [0, 1]: what reinforcement learning rewards.

    rewards = rewards_of(parsed, objects, ended=True)
    rewards.f1, rewards.iou, rewards.format, rewards.no_duplicates

Parsing is strict, matching is that of stage 2, and empty sets count as in evaluation: an answer without objects about
an image without objects is perfect. What holds no container is no answer, whatever the image shows: all its rewards
are 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from coordexp.codec.parse import ParsedRollout
from coordexp.codec.schema import NUM_BINS, BoxObject
from coordexp.eval.detection import Counts
from coordexp.eval.predictions.image_result import duplicate_rate, objects_of
from coordexp.matching import match_objects

F1_GATE = 0.5
"""Least mask IoU at which an object counts as found."""


class Rewards(NamedTuple):
    """Of one answer, each in [0, 1].

    f1: 2 TP / (2 TP + FP + FN), where an object is found by one of the same description with a mask IoU of at least
        `F1_GATE`, one to one; 1 where nothing was written and nothing is there.
    iou: twice the sum of mask IoU over the best one-to-one pairs, descriptions not looked at, over the number of
        objects on both sides; it grows with every box that comes nearer. 1 where neither side has an object.
    format: share of the written objects that parsing kept (1 of none), in an answer that is one whole container, with
        nothing before it, and that ended by itself; 0 for any other answer.
    no_duplicates: share of the written objects that do not repeat an earlier one (same description, box IoU above
        0.9), as `duplicate_rate` of evaluation says; 1 of none, so that it is no use on its own.
    """

    f1: float
    iou: float
    format: float
    no_duplicates: float


REWARDS = {f"coordexp_{name}": name for name in Rewards._fields}
"""Name of a reward function, as `--reward_funcs` takes it -> field of `Rewards`."""


def rewards_of(parsed: ParsedRollout, objects: Sequence[BoxObject], *, ended: bool) -> Rewards:
    """Of an answer to an image that shows `objects`.

    ended: whether the answer stopped by itself, before the limit of its length.
    """
    if parsed.invalid_rollout:
        return Rewards(0.0, 0.0, 0.0, 0.0)
    written = [obj.as_box() for obj in parsed.objects]
    return Rewards(
        f1=Counts.of(_num_found(written, objects), len(written), len(objects)).scores.f1,
        iou=_overlap(written, objects),
        format=_format(parsed, ended),
        no_duplicates=1.0 - duplicate_rate(objects_of(written, NUM_BINS, NUM_BINS)),
    )


def _num_found(written: Sequence[BoxObject], objects: Sequence[BoxObject]) -> int:
    """Matched pairs of equal description."""
    there = _by_desc(objects)
    return sum(
        len(match_objects(same, there[desc], gate=F1_GATE, top_k=len(there[desc])).matched)
        for desc, same in _by_desc(written).items()
        if desc in there
    )


def _by_desc(objects: Sequence[BoxObject]) -> dict[str, list[BoxObject]]:
    groups: defaultdict[str, list[BoxObject]] = defaultdict(list)
    for obj in objects:
        groups[obj.desc].append(obj)
    return dict(groups)


def _overlap(written: Sequence[BoxObject], objects: Sequence[BoxObject]) -> float:
    total = len(written) + len(objects)
    if not total:
        return 1.0
    return 2.0 * match_objects(written, objects, gate=0.0, top_k=max(1, len(objects))).maskiou_sum / total


def _format(parsed: ParsedRollout, ended: bool) -> float:
    if parsed.truncated or parsed.leading_text or not ended:
        return 0.0
    return len(parsed.objects) / len(parsed.records) if parsed.records else 1.0
