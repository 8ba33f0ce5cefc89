"""One of several training ranks before the same rollout server: MODEL_DIR SCENES_JSONL BASE_URL GROUP_PORT KEY_ENV OUT.

Run by test_rollout_server.py under torchrun; writes `OUT/rank_N.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from support.rollout import load_policy, read_requests

from coordexp.config.schema.rollout import RolloutMatching
from coordexp.errors import RolloutError
from coordexp.rollout.backends.vllm_client import VllmClientBackend


def main() -> None:
    model_dir, scenes, base_url, group_port, key_env, out = sys.argv[1:]
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model, template = load_policy(model_dir)
    servers = {
        "servers": [{"base_url": base_url, "group_port": int(group_port)}], "timeout_s": 60.0, "api_key_env": key_env,
    }  # fmt: skip
    settings = RolloutMatching(
        backend="vllm", max_new_tokens=48, decode_batch_size=2, vllm={"mode": "server", "server": servers}
    )
    backend = VllmClientBackend(settings, model, template, dtype=torch.float32)
    backend.push_policy(7)
    requests = read_requests(Path(scenes))[rank::world_size]
    answers = [list(rollout.response_token_ids) for rollout in backend.generate(requests)]
    backend.close()
    dist.barrier()
    backend = VllmClientBackend(settings, model, template, dtype=torch.bfloat16)
    try:
        backend.push_policy(8)
        failure = ""
    except RolloutError as error:
        failure = str(error)
    (Path(out) / f"rank_{rank}.json").write_text(json.dumps({"answers": answers, "failure": failure}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
