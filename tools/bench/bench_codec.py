"""Speed of the rollout parse against a plain per-token parser, and a fuzz run that counts drop reasons.

    OMP_NUM_THREADS=1 python tools/bench/bench_codec.py
    OMP_NUM_THREADS=1 python tools/bench/bench_codec.py --fuzz 1000000      # about 5 minutes

One thread; medians of repeated runs, wall time and CPU time (a busy neighbour shows in the wall time first).
Limits: 300 objects in less than 10 ms, 3000 objects in at most 12 times that. With --check a limit that is
not met in CPU time makes the exit status 1.

The fuzz run parses faulty rollouts for both test tokenizers: edits in the text, three ways to spell it, then
edits of the token ids. Each must give an append-ready prefix made of the response's own ids; for every 50th,
prefix + fragment must parse to the objects of the prefix followed by the appended one.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "fixtures" / "codec"))

from codec_fuzz import mutate_ids, random_objects, random_rollout
from codec_reference import plain_parse
from codec_tokenizers import MAKERS, encode, make_demo

from coordexp.codec.parse import ParsedRollout, parse_rollout
from coordexp.codec.schema import BoxObject, DropReason
from coordexp.codec.serialize import append_fragment, serialize

LIMIT_300_MS = 10.0
LIMIT_RATIO = 12.0
MISSED = BoxObject("missed", "bbox_2d", (1, 2, 3, 4))
WORDS = (
    "small red box", "a green circle", "person in a yellow coat", "tall blue ellipse", "white bird",
    "traffic light",
)  # fmt: skip


def measure(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median wall and CPU time of a call in milliseconds, after one warm-up."""
    call()
    wall, cpu = [], []
    for _ in range(repeats):
        wall_start, cpu_start = time.perf_counter(), time.thread_time()
        call()
        cpu.append(time.thread_time() - cpu_start)
        wall.append(time.perf_counter() - wall_start)
    return 1e3 * statistics.median(wall), 1e3 * statistics.median(cpu)


def bench_parse(repeats: int) -> bool:
    """Print the timings; whether all limits hold in CPU time."""
    tok = make_demo()
    tok.model_max_length = 10**9
    cpu_ms: dict[int, float] = {}
    print("objects  tokens   parse: wall / CPU ms   plain: wall / CPU ms   plain / parse (CPU)")
    for num_objects in (300, 3000):
        rng = random.Random(0)
        objects = random_objects(rng, num_objects, WORDS, poly_share=0.0)
        ids = encode(tok, serialize(objects) + "<|im_end|>")
        if len(parse_rollout(ids, tok).objects) != num_objects:
            raise AssertionError("the parse lost objects of an intact rollout")
        wall, cpu = measure(lambda ids=ids: parse_rollout(ids, tok), repeats * 300 // num_objects + 5)
        plain_wall, plain_cpu = measure(lambda ids=ids: plain_parse(ids, tok), 3)
        cpu_ms[num_objects] = cpu
        print(
            f"{num_objects:7d} {len(ids):7d} {wall:14.2f} / {cpu:6.2f} {plain_wall:14.1f} / {plain_cpu:6.1f}"
            f" {plain_cpu / cpu:15.1f}x"
        )
    ratio = cpu_ms[3000] / cpu_ms[300]
    fast, linear = cpu_ms[300] < LIMIT_300_MS, ratio <= LIMIT_RATIO
    print(f"300 objects: {cpu_ms[300]:.2f} ms, limit {LIMIT_300_MS} ms: {'ok' if fast else 'OVER'}")
    print(f"3000 to 300 objects: {ratio:.1f}x, limit {LIMIT_RATIO}x: {'ok' if linear else 'OVER'}")
    return fast and linear


def fuzz(num_rollouts: int, seed: int) -> None:
    """Parse `num_rollouts` faulty rollouts and print what they held."""
    counts: Counter[str] = Counter()
    start = time.perf_counter()
    for name, make in MAKERS.items():
        tok = make()
        rng = random.Random(f"{seed} {name}")
        pool = [random_rollout(rng, tok) for _ in range(min(4000, num_rollouts))]
        for number in range(num_rollouts // len(MAKERS)):
            num_edits = rng.choice((0, 1, 1, 2, 5))
            ids = mutate_ids(rng, rng.choice(pool), num_edits, len(tok) + 100)
            parsed = parse_rollout(ids, tok, allow_poly=rng.random() < 0.8)
            check(parsed, ids)
            if number % 50 == 0:
                check_appended(parsed, tok)
            count(parsed, counts)
    seconds = time.perf_counter() - start
    print(f"\n{counts['rollouts']} fuzzed rollouts in {seconds:.0f} s, no exception")
    for key in ("objects kept", "invalid_rollout", "leading_text", "truncated", *DropReason):
        print(f"  {key:18s} {counts[key]:10d}")


def check(parsed: ParsedRollout, ids: list[int]) -> None:
    """Invariants that are cheap enough for every rollout."""
    num_verbatim = parsed.num_verbatim_prefix_tokens
    assert parsed.prefix_text.endswith(("[", "}")), parsed.prefix_text
    assert parsed.prefix_token_ids[:num_verbatim] == parsed.response_token_ids[:num_verbatim]
    num_whole = max(0, min(num_verbatim, len(parsed.response_token_ids) - 1))  # im_end may split the last
    assert parsed.prefix_token_ids[:num_whole] == ids[:num_whole]
    assert parsed.prefix_is_fallback or parsed.text.startswith(parsed.prefix_text)


def check_appended(parsed: ParsedRollout, tok: Any) -> None:
    """Prefix + fragment holds the objects of the prefix, then the appended one."""
    fragment = encode(tok, append_fragment([MISSED], parsed.prefix_text) + "<|im_end|>")
    target = parse_rollout(parsed.prefix_token_ids + fragment, tok)
    boxes = [obj.as_box() for obj in target.objects if obj.kind == "bbox_2d"]
    assert boxes == [obj.as_box() for obj in parsed.prefix_objects if obj.kind == "bbox_2d"] + [MISSED]
    assert not target.truncated


def count(parsed: ParsedRollout, counts: Counter[str]) -> None:
    counts["rollouts"] += 1
    counts["objects kept"] += len(parsed.objects)
    for flag in ("invalid_rollout", "leading_text", "truncated"):
        counts[flag] += getattr(parsed, flag)
    counts.update({str(reason): number for reason, number in parsed.dropped_by_reason.items()})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=60, help="timed runs of the 300-object parse")
    parser.add_argument("--fuzz", type=int, default=0, metavar="N", help="also parse N fuzzed rollouts")
    parser.add_argument("--seed", type=int, default=0, help="of the fuzz run")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a limit is not met")
    args = parser.parse_args()
    within_limits = bench_parse(args.repeats)
    if args.fuzz:
        fuzz(args.fuzz, args.seed)
    return 1 if args.check and not within_limits else 0


if __name__ == "__main__":
    sys.exit(main())
