"""One rank of test_rollout_zero3.py, started by torchrun: MODEL_DIR SCENES_JSONL OUTPUT_FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from rollout_vllm_program import ids, settings
from support.rollout import load_policy, read_requests

from coordexp.rollout.session.build import build_policy_backend
from coordexp.rollout.session.session import RolloutSession
from coordexp.rollout.weights.policy_model import fingerprint
from coordexp.rollout.weights.sync import policy_tensors
from coordexp.trainers.step.ranks import most_over_ranks

ZERO3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},  # every weight is cut up
}


def main() -> None:
    model_dir, scenes, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    deepspeed.init_distributed("gloo")
    rank = dist.get_rank()
    requests = read_requests(scenes)[rank::2][: 3 + 7 * rank]  # other numbers of batches on the ranks
    whole, template = load_policy(model_dir)
    model, sharded_template = load_policy(model_dir)
    model.requires_grad_(True)
    engine: Any = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=ZERO3
    )[0]
    options: dict[str, Any] = {"model_dir": model_dir}
    plain = build_policy_backend(settings("hf"), model=whole, template=template, **options)
    sharded = build_policy_backend(settings("hf"), model=engine, template=sharded_template, **options)
    facts: dict[str, Any] = {"sharded": all(parameter.numel() == 0 for parameter in model.parameters())}
    facts["same_answers"] = ids(plain.generate(requests)) == ids(sharded.generate(requests))
    state = whole.state_dict()
    gathered = {name: tensor.clone() for name, tensor in policy_tensors(model)}
    facts["same_tensors"] = gathered.keys() == state.keys() and all(
        torch.equal(gathered[name], state[name]) for name in state
    )
    facts["sharded_again"] = all(parameter.numel() == 0 for parameter in model.parameters())
    facts["session_joins_every_call"] = session_answers(sharded, requests[: 1 + 4 * rank], rank) == ids(
        plain.generate(requests[: 1 + 4 * rank])
    )
    before = fingerprint(model)
    input_ids = torch.randint(300, (2, 9))
    for _ in range(2):
        loss = engine(input_ids=input_ids).logits.logsumexp(-1).mean()
        engine.backward(loss)
        engine.step()
    facts["fingerprint_changed"] = fingerprint(model) != before
    whole.load_state_dict({name: tensor.clone() for name, tensor in policy_tensors(model)})
    facts["same_answers_after_training"] = ids(plain.generate(requests)) == ids(sharded.generate(requests))
    (output / f"rank{rank}.json").write_text(json.dumps(facts))


def session_answers(backend: Any, requests: Any, rank: int) -> Any:
    """Answers through a session, two questions at a time: one call on rank 0 and three on rank 1, unless they agree."""
    session = RolloutSession(
        lambda: backend,
        first_question=lambda: Asked(requests[0]),
        template=backend.template,
        preflight_timeout_s=120.0,
        agree=lambda number: most_over_ranks(number, torch.device("cpu")),
        at_once=2,
    )
    questions = [Asked(request) for request in requests]
    chunks = list(session.generate_all(questions, version=1, seed_base=0))
    return ids([rollout for _, rollouts in chunks for rollout in rollouts])


class Asked:
    """A request as a question."""

    def __init__(self, request: Any) -> None:
        self.sample_id, self.messages, self.images = request.request_id, request.messages, request.images


main()
