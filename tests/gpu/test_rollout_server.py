"""A rollout server on the second GPU that gets its weights over NCCL: known answers after every push.

The server's engine has a GPU of its own, the trainer the first. On a CPU the weights go over TCP. 60 s on two GPUs.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gpu import Say, needs
from support.gpu_runs import write_always

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.vllm]

TOKENS = (70, 300)


def test_answers_are_known_after_every_push(
    device: torch.device, two_gpus: None, nano_model: Path, scenes: Path, tmp_path: Path, say: Say
):
    needs("ms-swift", "vLLM")
    from support.rollout import load_policy, read_requests
    from support.rollout_server import rollout_server

    from coordexp.config.schema.rollout import RolloutMatching
    from coordexp.rollout.backends.vllm_client import VllmClientBackend

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    policy: tuple[Any, Any] = load_policy(nano_model, dtype=dtype, device=device)
    asked = read_requests(scenes / "val.jsonl")
    second = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[-1]
    with rollout_server(
        nano_model, tmp_path / "log.txt", "--gpu-memory-utilization", 0.3, dtype=str(dtype).removeprefix("torch."),
        CUDA_VISIBLE_DEVICES=second,
    ) as server:  # fmt: skip
        settings = RolloutMatching(
            backend="vllm", max_new_tokens=12, decode_batch_size=8, vllm=server.settings()
        )
        backend = VllmClientBackend(settings, *policy, dtype=dtype)

        def answers(version: int) -> list[tuple[int, ...]]:
            backend.push_policy(version)
            return [rollout.response_token_ids for rollout in backend.generate(asked)]

        weights = {name: tensor.clone() for name, tensor in policy[0].state_dict().items()}
        first = answers(1)
        for version, token in enumerate(TOKENS, 2):
            write_always(policy[0], token)
            assert answers(version) == [(token,) * 12] * len(asked)
        policy[0].load_state_dict(weights)
        again = answers(9)
        started = time.perf_counter()
        backend.push_policy(10)
        seconds = time.perf_counter() - started
        backend.close()
    way = "NCCL" if device.type == "cuda" else "TCP"
    say(
        f"4 pushes over {way}: {2 * len(asked)} answers of one known token, {len(asked)} of the first weights as at "
        f"first ({len(set(first))} different); a push takes {seconds:.3f} s"
    )
    assert again == first
    assert len(set(first)) > 1
