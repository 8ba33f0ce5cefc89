"""Tokens per second with coordinates read at the median of their distribution, over the most likely token.

    python tools/bench/bench_readout.py                         # vllm and hf, nano model, 64 scenes
    python tools/bench/bench_readout.py --model DIR --data val.jsonl --device cuda --dtype bfloat16

One backend answers the same requests both ways, one right after the other in every round; each way's own tokens are
counted, since the answers differ. Medians over the rounds count, the ratio is taken within a round. Exit status 1 where
a median keeps less than 0.95 of the speed (CPU time on a CPU, where neighbours disturb the wall time; else wall time).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from rollout_setup import parser, prepared, settings

from coordexp.config.schema.rollout import Readout
from coordexp.rollout.types import RolloutRequest

BOUND = 0.95
WAYS: tuple[Readout, ...] = ("argmax", "median")


def tokens_per_second(backend: Any, requests: Sequence[RolloutRequest]) -> tuple[float, float]:
    """Of the answers, by wall time and by CPU time of this process."""
    started, cpu_started = time.perf_counter(), time.process_time()
    rollouts = backend.generate(requests)
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    num_tokens = sum(len(rollout.response_token_ids) for rollout in rollouts)
    return num_tokens / wall, num_tokens / cpu


def measure(
    args: argparse.Namespace, name: str, backend: Any, requests: Sequence[RolloutRequest], rows: list[Any]
) -> float:
    """Print both speeds; returns the ratio that is bounded. rows: gets them as tools/bench/gpu.py takes them."""
    speeds: dict[str, list[tuple[float, float]]] = {how: [] for how in WAYS}
    for index in range(args.rounds + 1):
        for how in sorted(WAYS, reverse=index % 2 == 1):
            backend.settings = settings(args, name, decoding={"coord": how})
            measured = tokens_per_second(backend, requests)
            if index:  # the first round warms up
                speeds[how].append(measured)
    for how, found in speeds.items():
        print(f"{name:>5} {how:<7} {statistics.median(wall for wall, _ in found):>9.0f} tokens/s", flush=True)
    by_wall, by_cpu = (
        statistics.median(m[k] / a[k] for a, m in zip(speeds["argmax"], speeds["median"], strict=True))
        for k in (0, 1)
    )
    print(f"{name:>5} median / argmax = {by_wall:.3f} by wall time, {by_cpu:.3f} by CPU time", flush=True)
    shown = {
        how: f"{statistics.median(wall for wall, _ in found):.0f} tokens/s" for how, found in speeds.items()
    }
    rows.append({
        "what": f"{name}, {len(requests)} answers, coordinates at the median", "found": shown["median"],
        "against": "at the most likely token", "baseline": shown["argmax"], "ratios": {"speed": by_wall},
    })  # fmt: skip
    return by_cpu if args.device == "cpu" else by_wall


def main() -> int:
    args = parser(__doc__, rounds=7).parse_args()
    ratios, rows = [], []
    with prepared(args) as setup:
        for name in args.backends:
            with setup.backend(settings(args, name, decoding={"coord": "median"})) as backend:
                ratios.append(measure(args, name, backend, setup.requests, rows))
    if args.json:
        args.json.write_text(json.dumps(rows))
    return 1 if min(ratios) < BOUND else 0


if __name__ == "__main__":
    sys.exit(main())
