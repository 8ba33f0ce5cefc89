"""Tokens per second through our rollout backends over the same engine called directly, on the same requests.

    python tools/bench/bench_rollout.py                         # vllm and hf, nano model, 64 scenes
    python tools/bench/bench_rollout.py --preset demo --rounds 7
    python tools/bench/bench_rollout.py --model DIR --data val.jsonl --device cuda --dtype bfloat16

All ways read, encode and answer the same questions with the same weights, one right after the other in every round:

    vllm ours      VllmColocateBackend.generate
    vllm direct    vLLM's LLMEngine: encode all, add all, step until done
    vllm swift     ms-swift's GRPOVllmEngine.infer over all requests
    hf ours        HfBackend.generate
    hf direct      transformers' generate on batches encoded by ms-swift's template

Medians over the rounds count, ratios are taken within a round; the answers of all ways must be equal. A busy
neighbour shows in the wall time more than in the CPU time. With --weights-changed each round of ours also pushes the
policy. Exit status 1 if vllm ours is below 0.9 of vllm direct (wall time).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rollout_setup import parser, prepared, settings

from coordexp.rollout.types import Rollout, RolloutRequest

BOUND = 0.9
Answers = list[tuple[int, ...]]


def vllm_direct(
    engine: Any, requests: Sequence[RolloutRequest], max_new_tokens: int, stop_ids: Sequence[int]
) -> Callable[[], Answers]:
    """vLLM alone, all requests handed over at once."""
    from vllm import SamplingParams

    from coordexp.swift_bridge.vllm_engine import encode_for_vllm, submit

    greedy = SamplingParams(
        max_tokens=max_new_tokens, temperature=0.0, stop_token_ids=list(stop_ids), detokenize=False
    )
    rounds = iter(range(10**9))

    def run() -> Answers:
        number, outputs = next(rounds), {}
        for index, request in enumerate(requests):
            submit(
                engine, f"{number}-{index}", encode_for_vllm(engine, request.messages, request.images), greedy
            )
        while engine.engine.has_unfinished_requests():
            outputs.update({o.request_id: o.outputs[0].token_ids for o in engine.engine.step() if o.finished})
        return [tuple(outputs[f"{number}-{index}"]) for index in range(len(requests))]

    return run


def vllm_swift(engine: Any, requests: Sequence[RolloutRequest], max_new_tokens: int) -> Callable[[], Answers]:
    """ms-swift's own loop around the engine."""
    from swift.infer_engine import InferRequest, RequestConfig

    config = RequestConfig(max_tokens=max_new_tokens, temperature=0.0, return_details=True)
    asked = [InferRequest(messages=list(r.messages), images=list(r.images)) for r in requests]

    def run() -> Answers:
        outputs = engine.infer(asked, config, use_tqdm=False)
        return [tuple(output.response.choices[0].token_ids) for output in outputs]

    return run


def hf_direct(
    model: Any, template: Any, requests: Sequence[RolloutRequest], max_new_tokens: int, batch_size: int
) -> Callable[[], Answers]:
    """transformers' generate on batches of the template."""
    from transformers import GenerationConfig

    from coordexp.swift_bridge.generation_prompts import (
        collate_questions,
        encode_question,
        questions_template,
        stop_token_ids,
    )

    stop_ids = stop_token_ids(template, model.generation_config.eos_token_id)
    questions = questions_template(template, model)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, eos_token_id=list(stop_ids),
        pad_token_id=template.tokenizer.pad_token_id,
    )  # fmt: skip

    def run() -> Answers:
        model.eval()
        answers: Answers = []
        for start in range(0, len(requests), batch_size):
            chunk = requests[start : start + batch_size]
            batch = collate_questions(
                questions, [encode_question(questions, r.messages, r.images) for r in chunk], model.device
            )
            with torch.no_grad():
                ids = model.generate(**batch, generation_config=config)
            for row in ids[:, batch["input_ids"].shape[1] :].tolist():
                end = next((i for i, token in enumerate(row) if token in stop_ids), len(row) - 1)
                answers.append(tuple(row[: end + 1]))
        model.train()
        return answers

    return run


def ours(backend: Any, requests: Sequence[RolloutRequest], *, push: bool) -> Callable[[], Answers]:
    versions = iter(range(2, 10**9))

    def run() -> Answers:
        if push:
            backend.push_policy(next(versions))
        rollouts: list[Rollout] = backend.generate(requests)
        return [rollout.response_token_ids for rollout in rollouts]

    return run


Row = dict[str, Any]


def measure(name: str, ways: dict[str, Callable[[], Answers]], rounds: int, rows: list[Row]) -> float:
    """Time all ways, interleaved, and print; returns the speed of ours over direct (wall time).

    rows: gets ours beside each other way, as tools/bench/gpu.py puts it into a table.
    """
    answers = {way: run() for way, run in ways.items()}  # warm-up
    for way, found in answers.items():
        different = sum(a != b for a, b in zip(answers["ours"], found, strict=True))
        if different:
            raise SystemExit(f"{name}: {different} of {len(found)} answers differ between ours and {way}.")
    num_tokens = sum(map(len, answers["ours"]))
    wall: dict[str, list[float]] = {way: [] for way in ways}
    cpu: dict[str, list[float]] = {way: [] for way in ways}
    for index in range(rounds):
        for way in sorted(ways, reverse=index % 2 == 1):
            started, cpu_started = time.perf_counter(), time.process_time()
            ways[way]()
            wall[way].append(time.perf_counter() - started)
            cpu[way].append(time.process_time() - cpu_started)
    for way, seconds in wall.items():
        low, high = num_tokens / max(seconds), num_tokens / min(seconds)
        speed = num_tokens / statistics.median(seconds)
        print(f"{name:>5} {way:<7} {speed:>9.0f} tokens/s   ({low:.0f} to {high:.0f})", flush=True)
    for way in list(ways)[1:]:
        by_wall, by_cpu = (paired_ratio(times[way], times["ours"]) for times in (wall, cpu))
        print(f"{name:>5} ours / {way} = {by_wall:.3f} by wall time, {by_cpu:.3f} by CPU time", flush=True)
        speeds = {
            each: f"{num_tokens / statistics.median(wall[each]):.0f} tokens/s" for each in ("ours", way)
        }
        rows.append({
            "what": f"{name}, {len(answers['ours'])} answers", "found": speeds["ours"], "against": f"the engine, {way}",
            "baseline": speeds[way], "ratios": {"speed": by_wall},
        })  # fmt: skip
    print(f"{name:>5} {num_tokens} tokens, medians of {rounds} rounds", flush=True)
    return paired_ratio(wall["direct"], wall["ours"])


def paired_ratio(others: Sequence[float], ours: Sequence[float]) -> float:
    """Median over the rounds of their time over ours: neighbours of one round saw the same load."""
    return statistics.median(other / own for other, own in zip(others, ours, strict=True))


def measure_push(backend: Any, model: Any, name: str) -> Row:
    """A push of all weights, with its proof, beside a copy of them on the device; seconds per GB."""
    from coordexp.rollout.weights.sync import policy_tensors

    tensors = [tensor for _, tensor in policy_tensors(model)]
    gigabytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e9

    def copy() -> None:
        for tensor in tensors:
            tensor.clone()
        if tensors[0].is_cuda:
            torch.cuda.synchronize()

    found: dict[str, list[float]] = {"push": [], "copy": []}
    for version in range(10**6, 10**6 + 4):
        for what, call in (("push", lambda version=version: backend.push_policy(version)), ("copy", copy)):
            started = time.perf_counter()
            call()
            found[what].append(time.perf_counter() - started)
    push, plain = (statistics.median(found[what][1:]) / gigabytes for what in ("push", "copy"))
    print(f"{name:>5} push {push:.3f} s/GB, copy {plain:.4f} s/GB, {gigabytes:.3f} GB", flush=True)
    return {
        "what": f"{name}, push of {gigabytes:.3g} GB with checksums", "found": f"{push:.3f} s/GB",
        "against": "a copy on the device", "baseline": f"{plain:.4f} s/GB", "ratios": {"time": push / plain},
    }  # fmt: skip


def main() -> int:
    arguments = parser(__doc__, rounds=11)
    arguments.add_argument(
        "--weights-changed", action="store_true", help="push the policy in every round of ours"
    )
    args = arguments.parse_args()
    ratios, rows = {}, []
    with prepared(args) as setup:
        for name in args.backends:
            with setup.backend(settings(args, name)) as backend:
                requests, limit = setup.requests, args.max_new_tokens
                ways = {"ours": ours(backend, requests, push=args.weights_changed)}
                if name == "vllm":
                    ways["direct"] = vllm_direct(backend._engine, requests, limit, backend._stop_ids)
                    ways["swift"] = vllm_swift(backend._engine, requests, limit)
                else:
                    ways["direct"] = hf_direct(setup.model, setup.template, requests, limit, args.batch_size)
                ratios[name] = measure(name, ways, args.rounds, rows)
                if name == "vllm":
                    rows.append(measure_push(backend, setup.model, name))
    if args.json:
        args.json.write_text(json.dumps(rows))
    return 1 if ratios.get("vllm", BOUND) < BOUND else 0


if __name__ == "__main__":
    sys.exit(main())
