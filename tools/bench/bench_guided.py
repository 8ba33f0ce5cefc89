"""What guided decoding costs, and whether whatever it writes is whole.

    python tools/bench/bench_guided.py                              # vllm and hf, nano model, 64 scenes
    python tools/bench/bench_guided.py --preset real-vocab          # Qwen's own vocabulary: 152,669 tokens
    python tools/bench/bench_guided.py --backends hf --answers 10000 --batch-size 128 --max-new-tokens 112

Both ways answer the same questions with the same weights, sampled at temperature 1, one right after the other in every
round: as the model writes, and guided. They write different numbers of tokens, so tokens per second are compared,
within a round; medians over the rounds count. With --answers so many guided answers are written (the questions again
and again, each time with other seeds) and parsed: exit status 1 unless each is whole, with no object dropped and every
box in its order.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from rollout_setup import Setup, parser, prepared, settings

from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.forms.choose import form_of
from coordexp.rollout.types import Rollout, RolloutRequest

SAMPLED = {"temperature": 1.0}


def fault_of(rollout: Rollout, form: AnswerForm, tokenizer: Any) -> str:
    """Why an answer is not whole; empty where it is."""
    parsed = form.parse(rollout.response_token_ids, tokenizer)
    if parsed.dropped_by_reason:
        return ", ".join(map(str, parsed.dropped_by_reason))
    flags = {
        "no container": parsed.invalid_rollout,
        "truncated": parsed.truncated,
        "leading text": parsed.leading_text,
    }
    return ", ".join(name for name, found in flags.items() if found)


def check(
    backend: Any, form: AnswerForm, tokenizer: Any, requests: Sequence[RolloutRequest], number: int
) -> Counter[str]:
    """Faults of `number` guided answers; what is whole counts under ''."""
    faults: Counter[str] = Counter()
    num_objects = num_tokens = 0
    while faults.total() < number:
        first = faults.total()
        asked = [replace(request, seed=first + i) for i, request in enumerate(requests[: number - first])]
        rollouts = backend.generate(asked)
        faults.update(fault_of(rollout, form, tokenizer) for rollout in rollouts)
        num_objects += sum(len(form.parse(r.response_token_ids, tokenizer).objects) for r in rollouts)
        num_tokens += sum(len(r.response_token_ids) for r in rollouts)
    print(
        f"{number} guided answers: {faults['']} whole, {num_objects} objects, {num_tokens} tokens", flush=True
    )
    for fault, count in faults.items():
        if fault:
            print(f"  {fault}: {count}")
    return faults


class Speed(NamedTuple):
    """Tokens per second of wall time, and of CPU time."""

    wall: float
    cpu: float


def speed(backend: Any, chosen: Any, requests: Sequence[RolloutRequest]) -> Speed:
    """Of one pass over the requests."""
    backend.settings = chosen
    started, cpu_started = time.perf_counter(), time.process_time()
    num_tokens = sum(len(rollout.response_token_ids) for rollout in backend.generate(requests))
    return Speed(
        num_tokens / (time.perf_counter() - started), num_tokens / (time.process_time() - cpu_started)
    )


def compare(name: str, backend: Any, args: argparse.Namespace, requests: Sequence[RolloutRequest]) -> None:
    """Print both speeds and their ratio."""
    plain = settings(args, name, decoding=SAMPLED)
    guided = settings(args, name, decoding={**SAMPLED, "guided": True})
    for chosen in (plain, guided):
        speed(backend, chosen, requests)  # warm-up
    pairs = [(speed(backend, plain, requests), speed(backend, guided, requests)) for _ in range(args.rounds)]
    for title, speeds in zip(("free", "guided"), zip(*pairs, strict=True), strict=True):
        print(
            f"{name:>5} {title:<7} {statistics.median(one.wall for one in speeds):>9.0f} tokens/s", flush=True
        )
    wall, cpu = (statistics.median(after[i] / before[i] for before, after in pairs) for i in (0, 1))
    print(f"{name:>5} guided / free = {wall:.3f} tokens/s by wall time, {cpu:.3f} by CPU time", flush=True)
    print(f"{name:>5} medians of {args.rounds} rounds", flush=True)


def run(name: str, args: argparse.Namespace, setup: Setup) -> bool:
    """Whether every answer that was looked at is whole."""
    form = form_of(args.form, args.field_order)
    guided = settings(args, name, decoding={**SAMPLED, "guided": True})
    with setup.backend(guided, form) as backend:
        if not args.answers:
            compare(name, backend, args, setup.requests)
            return True
        faults = check(backend, form, setup.template.tokenizer, setup.requests, args.answers)
        return set(faults) == {""}


def main() -> int:
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument(
        "--answers", type=int, default=0, help="write and parse so many, instead of timing"
    )
    arguments.add_argument("--form", default="coordjson", choices=("coordjson", "compact"))
    arguments.add_argument("--field-order", default="desc_first", choices=("desc_first", "geometry_first"))
    args = arguments.parse_args()
    with prepared(args) as setup:
        found = [run(name, args, setup) for name in args.backends]
    return 0 if all(found) else 1


if __name__ == "__main__":
    sys.exit(main())
