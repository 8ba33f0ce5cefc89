"""One rank of test_rollout_zero3.py, started by torchrun: MODEL_DIR SCENES_JSONL OUTPUT_FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import support.gloo_deepspeed  # noqa: F401
import torch
import torch.distributed as dist
from rollout_vllm_program import ids, settings
from support.rollout import load_policy, read_requests

from coordexp.codec.schema import BoxObject
from coordexp.config.schema.rollout import Matching
from coordexp.data.raw_samples import RawSample
from coordexp.metrics.keys_rollout import GT_OBJECTS
from coordexp.rollout.session.build import build_policy_backend
from coordexp.rollout.session.session import RolloutSession
from coordexp.rollout.weights.policy_model import fingerprint
from coordexp.rollout.weights.sync import policy_tensors
from coordexp.trainers.rollouts.answers import AnswerJudge
from coordexp.trainers.rollouts.eval import evaluate_rollouts
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
    asked = read_requests(scenes)[:5]
    for number in (1, 5):  # calls of the backend on the two ranks by themselves: 0 and 1, then 1 and 2
        facts[f"evaluates_{number}"] = evaluated_objects(sharded, asked[:number]) == number
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
    questions = [Asked(request) for request in requests]
    chunks = list(opened(backend, requests[0]).generate_all(questions, version=1, seed_base=0))
    return ids([rollout for _, rollouts in chunks for rollout in rollouts])


def evaluated_objects(backend: Any, requests: Any) -> float:
    """True objects that an evaluation of both ranks counts, one to a sample."""
    cat = BoxObject("cat", "bbox_2d", (100, 100, 300, 300))
    raws = [
        RawSample(f"scene:{n}", "scenes", (1,), None, (cat,), one.messages, one.images, 64, 64)
        for n, one in enumerate(requests)
    ]
    judge = AnswerJudge(backend.template.tokenizer, Matching())
    session = opened(backend, requests[0])
    numbers = evaluate_rollouts(session, judge, raws, settings("hf"), version=1, seed=0, step=0)
    return numbers[GT_OBJECTS]


def opened(backend: Any, first: Any) -> RolloutSession:
    """A session that hands out two questions at a time."""
    return RolloutSession(
        lambda: backend,
        first_question=lambda: Asked(first),
        template=backend.template,
        preflight_timeout_s=120.0,
        agree=lambda number: most_over_ranks(number, torch.device("cpu")),
        at_once=2,
    )


class Asked:
    """A request as a question."""

    def __init__(self, request: Any) -> None:
        self.sample_id, self.messages, self.images = request.request_id, request.messages, request.images


main()
