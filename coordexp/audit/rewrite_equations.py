"""How many objects a step's answers lose and get before they are taught, a second time, from boxes and pairs alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coordexp.metrics import keys_rollout as keys

Answer = Mapping[str, Any]
Box = tuple[float, float, float, float]


def rewrite_equations(answers: Sequence[Answer], targets: Mapping[str, Any]) -> dict[str, float]:
    """Counters of `rollout_matching.targets`; none where it changes nothing."""
    copies, near = targets["drop_duplicates_above_iou"], targets["replace_above_iou"]
    in_order = targets["missed"] == "in_order"
    values: dict[str, float] = {}
    taught = [
        answer for answer in answers if answer["target"] is not None and not answer["prefix_is_fallback"]
    ]
    gone = [_copies(answer, copies) for answer in taught]
    places = [_places(answer, left, near) for answer, left in zip(taught, gone, strict=True)]
    if copies is not None:
        values[keys.PREFIX_EDITS["duplicates_dropped"]] = float(sum(map(len, gone)))
    if near is not None:
        values[keys.PREFIX_EDITS["replaced"]] = float(sum(map(len, places)))
    if targets["drop_unmatched"]:
        stray = sum(len(answer["descs"]) - len(answer["matched"]) for answer in taught)
        values[keys.PREFIX_EDITS["unmatched_dropped"]] = float(stray - sum(map(len, [*gone, *places])))
    if in_order or near is not None:
        pairs = zip(taught, places, strict=True)
        values[keys.PREFIX_EDITS["missed_written"]] = float(sum(_written(a, p, in_order) for a, p in pairs))
    return values


def _unmatched(answer: Answer) -> list[int]:
    partners = {pred for pred, _ in answer["matched"]}
    return [pred for pred in range(len(answer["descs"])) if pred not in partners]


def _copies(answer: Answer, least: float | None) -> set[int]:
    """Predictions without a partner over one with a partner, or over an earlier one that is no copy."""
    copies: set[int] = set()
    if least is None:
        return copies
    boxes, unmatched = list(map(box_of, answer["bins"])), _unmatched(answer)
    originals = [pred for pred in range(len(boxes)) if pred not in unmatched]
    for pred in unmatched:
        if any(box_iou(boxes[pred], boxes[other]) >= least for other in originals):
            copies.add(pred)
        else:
            originals.append(pred)
    return copies


def _places(answer: Answer, gone: set[int], least: float | None) -> dict[int, int]:
    """Missed object of each prediction that makes room for one: the largest overlaps first."""
    if least is None:
        return {}
    missed = set(range(answer["num_gt"])) - {gt for _, gt in answer["matched"]}
    preds = {pred: box_of(answer["bins"][pred]) for pred in _unmatched(answer) if pred not in gone}
    truths = {gt: box_of(answer["gt_bins"][gt]) for gt in missed}
    places: dict[int, int] = {}
    while True:
        left = [
            (box_iou(preds[p], truths[g]), -p, -g)
            for p in preds
            for g in truths
            if p not in places and g not in places.values()
        ]
        if not left or max(left)[0] < least:
            return places
        _, pred, gt = max(left)
        places[-pred] = -gt


def _written(answer: Answer, places: Mapping[int, int], in_order: bool) -> int:
    """Missed objects before the answer's end: those with a place, and in order all before the last one there."""
    there = {gt for _, gt in answer["matched"]} | set(places.values())
    missed = set(range(answer["num_gt"])) - there
    return len(places) + sum(in_order and gt < max(there, default=-1) for gt in missed)


def box_of(bins: Sequence[float]) -> Box:
    """Left, top, right and bottom of a box or polygon."""
    return min(bins[::2]), min(bins[1::2]), max(bins[::2]), max(bins[1::2])


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union; 0 for two boxes without area."""
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    union = areas - width * height
    return width * height / union if union > 0 else 0.0
