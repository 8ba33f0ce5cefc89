"""How good are the answers themselves: the numbers stage 2 trains for, from a file of predictions.

Matching is that of stage-2 training and evaluation (mask IoU above a gate, descriptions ignored), so `rollout_f1` is
what `eval_rollout/f1` is for the same answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from coordexp.codec.schema import KIND_BBOX, BoxObject
from coordexp.geometry import quantize_points
from coordexp.matching import match_objects

NOT_DROPS = ("invalid_rollout", "truncated")
"""Entries of a line's `errors` that count answers, not objects."""


def on_policy_numbers(lines: Iterable[Mapping[str, Any]], *, gate: float = 0.3) -> dict[str, float]:
    """Over lines of `gt_vs_pred.jsonl`.

    rollout_precision, rollout_recall, rollout_f1   of matched objects (1 where there is nothing to be wrong about)
    desc_acc        share of matched objects with the right description
    bin_error       mean absolute error of the coordinates of matched boxes, in bins; absent without such boxes
    parse_rate      share of written objects that parsing kept
    answer_rate     share of images with a whole answer: a container, and not truncated
    """
    num_pred = num_gt = num_matched = num_named = num_dropped = num_images = num_whole = 0
    errors: list[float] = []
    for line in lines:
        preds, gts = (_objects(line, side) for side in ("pred", "gt"))
        match = match_objects(preds, gts, gate=gate)
        num_images += 1
        num_whole += not any(line["errors"].get(name) for name in NOT_DROPS)
        num_dropped += sum(count for reason, count in line["errors"].items() if reason not in NOT_DROPS)
        num_pred, num_gt = num_pred + len(preds), num_gt + len(gts)
        num_matched += len(match.matched)
        for p, g in match.matched:
            num_named += preds[p].desc == gts[g].desc
            if preds[p].kind == gts[g].kind == KIND_BBOX:
                errors.append(float(np.abs(np.subtract(preds[p].bins, gts[g].bins)).mean()))
    precision, recall = _share(num_matched, num_pred), _share(num_matched, num_gt)
    numbers = {
        "rollout_precision": precision,
        "rollout_recall": recall,
        "rollout_f1": _share(2 * num_matched, num_pred + num_gt),
        "desc_acc": _share(num_named, num_matched),
        "parse_rate": _share(num_pred, num_pred + num_dropped),
        "answer_rate": _share(num_whole, num_images),
    }
    return numbers | ({"bin_error": float(np.mean(errors))} if errors else {})


def _objects(line: Mapping[str, Any], side: str) -> Sequence[BoxObject]:
    objects = []
    for obj in line[side]:
        points = np.asarray(obj["points"], dtype=np.float64).reshape(-1, 2)
        bins = quantize_points(points, line["width"], line["height"]).ravel().tolist()
        objects.append(BoxObject(obj["desc"], obj["type"], tuple(bins)))
    return objects


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0
