"""Ask one model about pictures on every way and write down what its vision tower sees: MODEL DATA WORK SERVER.

Run by test_pictures_of_engines.py. For each way a folder of WORK holds what entered the tower, one file a picture;
WORK/facts.json holds prompt and answer ids. `SERVER` is the address of a `vllm serve` of the same model, whose worker
writes into WORK/openai.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import requests
import torch
from support.rollout_server import is_healthy
from support.vllm_watch import watch_tower

from coordexp.inference.infer import Inference
from coordexp.inference.settings import InferSettings
from coordexp.swift_bridge.prompts import encode_prompt

ANSWER = {"role": "assistant", "content": '{"objects": []}'}
MAX_NEW_TOKENS = 12
MOST_WAIT_S = 600.0


def prepared(model: Path, data: Path, work: Path, backend: str, **settings: Any) -> Inference:
    chosen = InferSettings(backend=backend, batch_size=1, max_new_tokens=MAX_NEW_TOKENS, **settings)
    return Inference.prepare(model, data, work / "unused", chosen)


def training(model: Any, template: Any, requests: Any, folder: Path) -> list[list[int]]:
    """A forward and backward pass for each sample, as a training step makes them."""
    watch_tower(model.model.visual, folder)
    template.set_mode("train")
    template.model = model
    prompts = []
    for request in requests:
        row = {"messages": [*request.messages, ANSWER], "images": list(request.images)}
        prompts.append(list(encode_prompt(template, row).token_ids))
        batch = template.data_collator([template.encode(row)])
        for key in ("text_position_ids", "position_ids", "loss_scale"):
            batch.pop(key, None)
        model(**batch).loss.backward()
    return prompts


def answers(inference: Inference, backend: Any) -> dict[str, Any]:
    rollouts = [backend.generate([request])[0] for request in inference.requests()]
    return {
        "prompts": [list(rollout.prompt_token_ids) for rollout in rollouts],
        "answers": [list(rollout.response_token_ids) for rollout in rollouts],
        "logprobs": [list(rollout.token_logprobs) for rollout in rollouts],
    }


def ask_server(facts: dict[str, Any], model: Path, data: Path, work: Path, url: str) -> None:
    """Last, since a server takes its time to start."""
    end = time.monotonic() + MOST_WAIT_S
    while not is_healthy(url):
        assert time.monotonic() < end, "the server does not answer"
        time.sleep(0.5)
    watch = {"method": "watch_pictures", "args": [str(work / "openai")]}
    requests.post(url + "/collective_rpc", json=watch, timeout=60).raise_for_status()
    inference = prepared(model, data, work, "openai", base_url=url + "/v1", served_model="model")
    backend, _ = inference.load_backend()
    facts["openai"] = answers(inference, backend)
    backend.close()


def main() -> None:
    model, data, work = (Path(argument) for argument in sys.argv[1:4])
    facts: dict[str, Any] = {}

    inference = prepared(model, data, work, "hf")
    backend, _ = inference.load_backend()
    hooks = watch_tower(backend.model.model.visual, work / "hf")
    facts["hf"] = answers(inference, backend)
    for hook in hooks:
        hook.remove()
    facts["training"] = {
        "prompts": training(backend.model.train(), backend.template, inference.requests(), work / "training")
    }
    backend.close()

    inference = prepared(model, data, work, "vllm", max_model_len=512)
    backend, _ = inference.load_backend()
    worker = backend._engine.engine.model_executor.driver_worker.worker
    watch_tower(worker.model_runner.get_model().visual, work / "vllm")
    with torch.inference_mode():
        facts["vllm"] = answers(inference, backend)
    backend.close()
    ask_server(facts, model, data, work, sys.argv[4])
    (work / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
