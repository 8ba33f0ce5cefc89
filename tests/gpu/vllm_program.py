"""vLLM beside a model in training, on one device or on two: MODEL SCENES DEVICE SLEEP_LEVEL TENSOR_PARALLEL OUT.

Run by the checks of vLLM; what they compare is written to OUT, by each rank to OUT.RANK.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.gpu_runs import write_always
from support.rollout import load_policy, read_requests

from coordexp.config.schema.rollout import RolloutMatching
from coordexp.rollout.session.build import build_policy_backend

TOKENS = (70, 300)
NEW_TOKENS = 12


def used(device: torch.device) -> int:
    """Bytes of the device's memory that are taken, by whomever."""
    if device.type == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def main() -> None:
    model_dir, scenes, named, level, parallel, out = sys.argv[1:]
    size, rank = int(parallel), int(os.environ.get("RANK", "0"))
    device = torch.device(named if named == "cpu" else f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl")
    dtype = torch.float32 if named == "cpu" else torch.bfloat16
    model, template = load_policy(model_dir, dtype=dtype, device=device)
    asked = read_requests(Path(scenes))[rank::size]
    vllm = {
        "max_model_len": 512, "max_num_seqs": 8, "enforce_eager": True, "sleep_level": int(level),
        "tensor_parallel_size": size, "gpu_memory_utilization": 0.3,
    }  # fmt: skip
    settings = RolloutMatching(
        backend="vllm",
        max_new_tokens=NEW_TOKENS,
        decode_batch_size=8,
        vllm={k: v for k, v in vllm.items() if v != 0},
    )
    backend: Any = build_policy_backend(
        settings, model=model, template=template, model_dir=model_dir, torch_dtype=dtype
    )
    facts: dict[str, Any] = {"asleep": [used(device)], "rounds": []}

    def answers(version: int | None) -> None:
        """Ask, after a push of what the model holds or with the weights as they were."""
        if version is not None:
            backend.push_policy(version)
        found = [list(rollout.response_token_ids) for rollout in backend.generate(asked)]
        facts["rounds"].append({"pushed": version, "answers": found})
        facts["asleep"].append(used(device))

    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    answers(1)
    answers(None)  # after a sleep
    for version, token in enumerate(TOKENS, 2):
        write_always(model, token)
        answers(version)
        answers(None)
    model.load_state_dict(first)
    answers(9)
    with backend._awake():
        facts["awake"] = used(device)
    backend.close()
    Path(f"{out}.{rank}").write_text(json.dumps(facts))
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
