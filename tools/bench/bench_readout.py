"""Tokens per second with coordinates read at the median of their distribution, over the most likely token.

    python tools/bench/bench_readout.py                         # vllm and hf, nano model, 64 scenes
    python tools/bench/bench_readout.py --model DIR --data val.jsonl --device cuda --dtype bfloat16

One backend answers the same requests both ways, one right after the other in every round; each way's own tokens are
counted, since the answers differ. Medians over the rounds count, the ratio is taken within a round. Exit status 1 where
a median keeps less than 0.95 of the speed (CPU time on a CPU, where neighbours disturb the wall time; else wall time).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_rollout import load_policy, read_requests

from coordexp.config.schema.rollout import Readout, RolloutMatching
from coordexp.data.shapes import PRESETS as SCENES
from coordexp.data.shapes import generate_shapes
from coordexp.models.tiny import build_tiny_model
from coordexp.rollout.session.build import build_policy_backend
from coordexp.rollout.types import RolloutRequest

BOUND = 0.95
WAYS: tuple[Readout, ...] = ("argmax", "median")


def settings(args: argparse.Namespace, backend: str, how: Readout) -> RolloutMatching:
    vllm = {
        "max_model_len": args.max_model_len, "max_num_seqs": args.batch_size, "enforce_eager": args.device == "cpu",
    }  # fmt: skip
    return RolloutMatching(
        backend=backend, decode_batch_size=args.batch_size, max_new_tokens=args.max_new_tokens, vllm=vllm,
        decoding={"coord": how},
    )  # fmt: skip


def tokens_per_second(backend: Any, requests: Sequence[RolloutRequest]) -> tuple[float, float]:
    """Of the answers, by wall time and by CPU time of this process."""
    started, cpu_started = time.perf_counter(), time.process_time()
    rollouts = backend.generate(requests)
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    num_tokens = sum(len(rollout.response_token_ids) for rollout in rollouts)
    return num_tokens / wall, num_tokens / cpu


def measure(args: argparse.Namespace, name: str, backend: Any, requests: Sequence[RolloutRequest]) -> float:
    """Print both speeds; returns the ratio that is bounded."""
    speeds: dict[str, list[tuple[float, float]]] = {how: [] for how in WAYS}
    for index in range(args.rounds + 1):
        for how in sorted(WAYS, reverse=index % 2 == 1):
            backend.settings = settings(args, name, how)
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
    return by_cpu if args.device == "cpu" else by_wall


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", nargs="+", default=["vllm", "hf"], choices=("vllm", "hf"))
    parser.add_argument("--model", help="checkpoint folder; without it a random tiny model is made")
    parser.add_argument("--data", type=Path, help="JSONL with images; without it scenes are drawn")
    parser.add_argument("--preset", default="nano", help="size of the tiny model")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as scratch:
        model_dir = args.model or f"{scratch}/model"
        data = args.data or Path(scratch) / "scenes" / "val.jsonl"
        if args.model is None:
            build_tiny_model(model_dir, preset=args.preset)
        if args.data is None:
            generate_shapes(data.parent, SCENES["demo"], num_train=0, num_val=args.requests)
        requests = read_requests(data, args.requests)
        model, template = load_policy(model_dir, dtype=args.dtype, device=args.device)
        ratios = []
        for name in args.backends:
            backend: Any = build_policy_backend(
                settings(args, name, "median"), model=model, template=template, model_dir=model_dir,
                torch_dtype=getattr(torch, args.dtype),
            )  # fmt: skip
            backend.push_policy(1)
            ratios.append(measure(args, name, backend, requests))
            backend.close()
    return 1 if min(ratios) < BOUND else 0


if __name__ == "__main__":
    sys.exit(main())
