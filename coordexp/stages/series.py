"""The numbers of one key over a run, as a gate reads them: one a step, NaN where there should have been one."""

from __future__ import annotations

import math
from collections.abc import Iterable

from coordexp.metrics.catalog import EVAL_PREFIX
from coordexp.metrics.keys_run import NONFINITE_METRICS_TOTAL
from coordexp.metrics.payload import Payload


def series_of(payloads: Iterable[Payload], key: str) -> list[tuple[int, float]]:
    """(step, number) of every record that has `key`, steps ascending.

    A record leaves out numbers that are not finite and counts them: one of the same mode that lacks `key` and counts
    some stands for NaN. A run that was resumed repeats steps; the later records hold.
    """
    mode = "eval" if key.startswith(EVAL_PREFIX) else "train"
    found: dict[int, float] = {}
    last_step = -1
    for payload in payloads:
        step, numbers = payload["global_step"], payload["metrics"]
        if step < last_step:  # resumed at an earlier step: what came after it has not happened
            found = {known: value for known, value in found.items() if known < step}
        last_step = step
        if payload["mode"] != mode:
            continue
        if key in numbers:
            found[step] = float(numbers[key])
        elif numbers.get(NONFINITE_METRICS_TOTAL, 0) > 0:
            found.setdefault(step, math.nan)
    return sorted(found.items())
