"""A real vLLM engine beside a model in training, in one process: MODEL_DIR SCENES_JSONL OUTPUT_JSON.

Run by test_rollout_vllm.py. Everything that is compared is written to OUTPUT_JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from support.rollout import load_policy, picture_requests, read_requests

from coordexp.codec.parse import parse_rollout
from coordexp.config.schema.rollout import RolloutMatching
from coordexp.errors import RolloutError
from coordexp.rollout.session.build import build_policy_backend
from coordexp.rollout.session.preflight import preflight
from coordexp.rollout.time_limit import TimeLimit
from coordexp.rollout.types import Rollout, RolloutRequest

RULES = {
    "enabled": True, "min_new_tokens": 8, "max_consecutive_token_repeats": 6, "ngram_size": 3, "ngram_repeats": 5,
}  # fmt: skip
Facts = dict[str, Any]


def settings(backend: str, **values: Any) -> RolloutMatching:
    vllm: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 8, "enforce_eager": True}
    if backend == "vllm":
        vllm["engine_args"] = {"max_num_batched_tokens": 640, "mm_processor_cache_gb": 0.25}
    return RolloutMatching(
        **{"backend": backend, "max_new_tokens": 48, "decode_batch_size": 8, "vllm": vllm, **values}
    )


def train(model: Any, template: Any, requests: list[RolloutRequest], steps: int) -> None:
    """Optimizer steps on an answer that means nothing, large enough to change what is generated."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    template.model = model
    for step in range(steps):
        chosen = requests[4 * step : 4 * step + 4]
        encoded = [
            template.encode(
                {
                    "messages": [*request.messages, {"role": "assistant", "content": '{"objects": []}'}],
                    "images": list(request.images),
                }
            )
            for request in chosen
        ]
        batch = template.data_collator(encoded)
        for key in ("text_position_ids", "position_ids", "loss_scale"):
            batch.pop(key, None)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def ids(rollouts: list[Rollout]) -> list[list[int]]:
    return [list(rollout.response_token_ids) for rollout in rollouts]


def compare(hf: list[Rollout], vllm: list[Rollout]) -> Facts:
    """How two backends' answers to the same requests relate."""
    pairs = list(zip(hf, vllm, strict=True))
    gaps = [abs(p - q) for a, b in pairs for p, q in zip(a.token_logprobs, b.token_logprobs, strict=True)]
    return {
        "equal_answers": sum(a.response_token_ids == b.response_token_ids for a, b in pairs),
        "equal_prompts": sum(a.prompt_token_ids == b.prompt_token_ids for a, b in pairs),
        "equal_endings": sum(a.repeat_terminated == b.repeat_terminated for a, b in pairs),
        "terminated": sum(b.repeat_terminated for _, b in pairs),
        "logprob_gap": max(gaps),
        "distinct_answers": len({a.response_token_ids for a, _ in pairs}),
        "versions": sorted({b.policy_version for _, b in pairs}),
    }


def error_of(action: Callable[[], Any]) -> str:
    """What a RolloutError says; empty when there was none."""
    try:
        action()
    except RolloutError as error:
        return str(error)
    return ""


def parity(
    facts: Facts, model: Any, template: Any, requests: list[RolloutRequest], hf: Any, vllm: Any
) -> None:
    """Before training, after it, and with LoRA layers in the model."""
    facts["no push"] = error_of(lambda: vllm.generate(requests[:1]))
    facts["preflight_tokens"] = len(preflight(vllm, requests[0], template).response_token_ids)
    vllm.push_policy(1)
    state = torch.get_rng_state()
    answers = vllm.generate(requests)
    facts["random_state_kept"] = torch.equal(state, torch.get_rng_state())
    facts["before"] = compare(hf.generate(requests), answers)
    with TemporaryDirectory() as folder:
        pictures = picture_requests(Path(folder))
        facts["pictures"] = compare(hf.generate(pictures), vllm.generate(pictures))
    for name, backend in (("hf", hf), ("vllm", vllm)):
        backend.settings = settings(name, repeat_terminate=RULES)
    facts["rules"] = compare(hf.generate(requests), vllm.generate(requests))
    readouts(facts, requests, answers, hf, vllm)
    guided(facts, requests, hf, vllm)
    for name, backend in (("hf", hf), ("vllm", vllm)):
        backend.settings = settings(name)
    train(model, template, requests, steps=5)
    facts["withheld"] = error_of(lambda: vllm.generate(requests[:2]))
    started = time.perf_counter()
    vllm.push_policy(2)
    facts["push_s"] = time.perf_counter() - started
    trained = vllm.generate(requests)
    facts["changed_answers"] = sum(a != b for a, b in zip(ids(answers), ids(trained), strict=True))
    facts["after"] = compare(hf.generate(requests), trained)


def readouts(
    facts: Facts, requests: list[RolloutRequest], most_likely: list[Rollout], hf: Any, vllm: Any
) -> None:
    """Coordinates read from their distribution, against what is most likely."""
    for how in ("median", "expectation"):
        for name, backend in (("hf", hf), ("vllm", vllm)):
            backend.settings = settings(name, decoding={"coord": how})
        read = vllm.generate(requests)
        changed = sum(a != b for a, b in zip(ids(most_likely), ids(read), strict=True))
        facts[how] = compare(hf.generate(requests), read) | {"changed_answers": changed}


def guided(facts: Facts, requests: list[RolloutRequest], hf: Any, vllm: Any) -> None:
    """Only whole answers, in two ways to decode greedily; and sampled ones beside questions that are not guided."""
    limit = {"max_new_tokens": 100}
    ways = {"guided": ({}, {}), "guided median": ({"coord": "median"}, {"repeat_terminate": RULES})}
    for name, (decoding, more) in ways.items():
        for kind, backend in (("hf", hf), ("vllm", vllm)):
            backend.settings = settings(kind, decoding={"guided": True, **decoding}, **limit, **more)
        answers = vllm.generate(requests)
        facts[name] = compare(hf.generate(requests), answers) | {"whole": num_whole(answers, hf)}
    sampled = {"guided": True, "temperature": 1.5, "guided_max_objects": 1}
    vllm.settings = settings("vllm", decoding=sampled, **limit)
    facts["guided"]["whole_sampled"] = num_whole(vllm.generate(requests), hf)


def num_whole(rollouts: list[Rollout], hf: Any) -> int:
    """Answers that end well, with nothing that the parser drops."""
    parsed = [parse_rollout(rollout.response_token_ids, hf.template.tokenizer) for rollout in rollouts]
    return sum(not (p.invalid_rollout or p.truncated or p.dropped_by_reason) for p in parsed)


def sampling(facts: Facts, requests: list[RolloutRequest], vllm: Any) -> None:
    sampled = {"decoding": {"temperature": 1.0, "top_p": 0.95}}
    vllm.settings = settings("vllm", **sampled)
    first, again = ids(vllm.generate(requests[:8])), ids(vllm.generate(requests[7::-1]))[::-1]
    others = ids(vllm.generate([replace(r, seed=5000 + i) for i, r in enumerate(requests[:8])]))
    facts["sampling"] = {
        "same_seed_same_answer": sum(a == b for a, b in zip(first, again, strict=True)),
        "other_seed_same_answer": sum(a == b for a, b in zip(first, others, strict=True)),
    }
    vllm.settings = settings("vllm")


def failures(facts: Facts, requests: list[RolloutRequest], vllm: Any) -> None:
    """Faults put around the real engine."""
    inner = vllm._engine.engine
    step = inner.step

    def dies() -> Any:
        raise RuntimeError("CUDA error: device-side assert")

    def answers_another_prompt() -> Any:
        outputs = step()
        for output in outputs:
            output.prompt_token_ids = [*output.prompt_token_ids, 5]
        return outputs

    def loses_requests() -> Any:
        inner.abort_request(list(inner.output_processor.external_req_ids))
        return step()

    faults = {
        "dies": dies,
        "answers another prompt": answers_another_prompt,
        "loses requests": loses_requests,
    }
    for name, fault in faults.items():
        inner.step = fault
        facts[name] = error_of(lambda: vllm.generate(requests[:2]))
        inner.step = step
    limit = TimeLimit(1e-9, "rollout_matching.generate_timeout_s")
    facts["timeout"] = error_of(lambda: vllm.generate(requests[:2], time_limit=limit))
    message = {"role": "user", "content": "<image><image>Find all"}
    two_images = replace(requests[0], messages=(message,), images=requests[0].images * 2)
    facts["two images"] = error_of(lambda: vllm.generate([two_images]))
    facts["recovers"] = len(vllm.generate(requests[:2]))


def lost_pushes(facts: Facts, model: Any, requests: list[RolloutRequest], hf: Any, vllm: Any) -> None:
    """A push that does not arrive, one without a tensor, one with LoRA layers."""
    transfer = vllm._transfer
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]), model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    vllm._transfer = list  # read, but handed to nobody
    facts["lost push"] = error_of(lambda: vllm.push_policy(3))
    facts["after lost push"] = error_of(lambda: vllm.generate(requests[:1]))

    class WithoutHead:
        def __init__(self, weights: Any) -> None:
            self._weights = weights

        def __iter__(self) -> Any:
            return ((name, tensor) for name, tensor in self._weights if name != "lm_head.weight")

    def without_head(weights: Any) -> None:
        model.lm_head.weight.data.mul_(1.01)
        transfer(WithoutHead(weights))

    vllm._transfer = without_head
    facts["push without head"] = error_of(lambda: vllm.push_policy(4))
    vllm._transfer = transfer
    vllm.push_policy(5)
    facts["lora"] = compare(hf.generate(requests), vllm.generate(requests))


def main() -> None:
    model_dir, scenes, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    model, template = load_policy(model_dir)
    requests = read_requests(scenes)
    common: Facts = {"model": model, "template": template, "model_dir": model_dir, "token_logprobs": True}
    hf = build_policy_backend(settings("hf"), **common)
    state = torch.get_rng_state()
    started = time.perf_counter()
    vllm = build_policy_backend(settings("vllm", repeat_terminate=RULES), **common)
    facts: Facts = {"start_s": time.perf_counter() - started}
    vllm.settings = settings("vllm")
    facts["trust_remote_code"] = vllm._engine.engine.model_config.trust_remote_code
    config = vllm._engine.engine.vllm_config
    facts["engine"] = {
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "mm_processor_cache_gb": config.model_config.multimodal_config.mm_processor_cache_gb,
    }
    facts["random_state_kept_at_start"] = torch.equal(state, torch.get_rng_state())
    parity(facts, model, template, requests, hf, vllm)
    sampling(facts, requests, vllm)
    failures(facts, requests, vllm)
    lost_pushes(facts, model, requests, hf, vllm)
    facts["training"] = model.training and template.mode == "train"
    vllm.close()
    vllm.close()
    facts["closed"] = error_of(lambda: vllm.generate(requests[:1]))
    output.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
