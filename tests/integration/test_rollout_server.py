"""A real rollout server (vLLM, CPU build): it answers with the pushed weights or not at all."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests as http
import torch
from peft import LoraConfig, inject_adapter_in_model
from support.processes import ROOT, run_coordexp
from support.rollout import load_policy, picture_requests, read_requests
from support.rollout_server import RolloutServer, rollout_server
from support.vllm import require_vllm

from coordexp.config.schema.rollout import RolloutMatching
from coordexp.errors import RolloutError
from coordexp.rollout.backends.hf import HfBackend
from coordexp.rollout.backends.vllm_client import VllmClientBackend
from coordexp.rollout.session.preflight import preflight
from coordexp.rollout.time_limit import TimeLimit
from coordexp.rollout.types import Rollout, RolloutRequest

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
NUM_SCENES = 8
DAMAGED = "layers.0.self_attn.q_proj"
RULES = {
    "enabled": True, "min_new_tokens": 8, "max_consecutive_token_repeats": 6, "ngram_size": 3, "ngram_repeats": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from coordexp.data.shapes import PRESETS, generate_shapes

    root = tmp_path_factory.mktemp("rollout_server") / "scenes"
    generate_shapes(root, PRESETS["pixels"], num_train=0, num_val=NUM_SCENES, seed=3)
    return root / "val.jsonl"


@pytest.fixture(scope="module")
def server(nano_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutServer]:
    require_vllm()
    with rollout_server(nano_model, tmp_path_factory.mktemp("server") / "log.txt") as running:
        yield running


@pytest.fixture(scope="module")
def untied(nano_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutServer]:
    """A second server, whose engine keeps head and embedding apart."""
    require_vllm()
    with rollout_server(nano_model, tmp_path_factory.mktemp("untied") / "log.txt", "--own-head") as running:
        yield running


@pytest.fixture(scope="module")
def never_pushed(server: RolloutServer, questions: Path) -> http.Response:
    """What the server says to a question before it has got any weights; asked for before all other fixtures."""
    return post(server, "/generate", body_of(read_requests(questions)[0], 0))


@pytest.fixture
def policy(nano_model: Path, never_pushed: http.Response) -> tuple[Any, Any]:
    return load_policy(nano_model)


@pytest.fixture(scope="module")
def asked(questions: Path) -> list[RolloutRequest]:
    return read_requests(questions)


def settings(server: RolloutServer, **values: Any) -> RolloutMatching:
    section = {"max_new_tokens": 48, "decode_batch_size": 4, **values}
    return RolloutMatching(backend="vllm", vllm=server.settings(), **section)


def make(server: RolloutServer, policy: tuple[Any, Any], **values: Any) -> VllmClientBackend:
    return VllmClientBackend(settings(server, **values), *policy, dtype=torch.float32, token_logprobs=True)


def by_transformers(policy: tuple[Any, Any], asked: list[RolloutRequest], **values: Any) -> list[Rollout]:
    section = RolloutMatching(backend="hf", max_new_tokens=48, decode_batch_size=8, **values)
    return HfBackend(section, *policy, token_logprobs=True).generate(asked)


def body_of(request: RolloutRequest, version: int, **values: Any) -> dict[str, Any]:
    image = base64.b64encode(Path(request.images[0]).read_bytes()).decode()
    question = {
        "messages": list(request.messages),
        "images": [image],
        "seed": 1,
        "request_id": request.request_id,
    }
    return {
        "settings": RolloutMatching(backend="hf").model_dump(mode="json"),
        "policy_version": version, "max_new_tokens": 4, "requests": [question], **values,
    }  # fmt: skip


def post(server: RolloutServer, path: str, body: Any, key: str | None = None) -> http.Response:
    headers = {"Authorization": f"Bearer {server.api_key if key is None else key}"}
    return http.post(server.base_url + path, json=body, headers=headers, timeout=60)


def assert_same(ours: list[Rollout], theirs: list[Rollout], version: int) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.response_token_ids == b.response_token_ids
        assert a.prompt_token_ids == b.prompt_token_ids
        assert a.token_logprobs == pytest.approx(b.token_logprobs, abs=2e-5)
        assert (a.finish_reason, a.repeat_terminated) == (b.finish_reason, b.repeat_terminated)
        assert a.policy_version == version


def ids(rollouts: list[Rollout]) -> list[tuple[int, ...]]:
    return [rollout.response_token_ids for rollout in rollouts]


def test_nothing_is_answered_before_a_push(server, never_pushed, policy, asked):
    assert never_pushed.status_code == 409
    assert "no weights are served: none were pushed yet" in never_pushed.json()["error"]
    backend = make(server, policy)
    with pytest.raises(RolloutError, match="before any policy was pushed"):
        backend.generate(asked[:1])
    backend.close()


def test_answers_are_those_of_transformers_before_and_after_the_weights_change(server, policy, asked):
    model = policy[0]
    backend = make(server, policy)
    assert len(preflight(backend, asked[0], policy[1]).response_token_ids) == 4
    backend.push_policy(1)
    first = backend.generate(asked)
    assert_same(first, by_transformers(policy, asked), 1)
    health = http.get(server.base_url + "/health", timeout=10).json()
    assert (health["status"], health["policy_version"]) == ("ok", 1)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    with pytest.raises(RolloutError, match="policy version 1, but the trained weights have changed"):
        backend.generate(asked[:1])
    checksum = backend.policy_checksum
    backend.push_policy(2)
    assert backend.policy_checksum != checksum
    second = backend.generate(asked)
    assert ids(second) != ids(first)
    assert_same(second, by_transformers(policy, asked), 2)

    inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]), model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    backend.push_policy(3)
    third = backend.generate(asked)
    assert ids(third) != ids(second)
    assert_same(third, by_transformers(policy, asked), 3)
    backend.close()


def test_repetition_is_ended_where_transformers_ends_it(server, policy, asked):
    backend = make(server, policy, repeat_terminate=RULES)
    backend.push_policy(1)
    rollouts = backend.generate(asked)
    assert any(rollout.repeat_terminated for rollout in rollouts)
    assert_same(rollouts, by_transformers(policy, asked, repeat_terminate=RULES), 1)
    backend.close()


def test_a_seed_makes_the_answer_however_the_questions_are_split(server, policy, asked):
    backend = make(server, policy, decoding={"temperature": 1.0})
    backend.push_policy(1)
    together = ids(backend.generate(asked))
    assert ids(backend.generate(asked[5:])) + ids(backend.generate(asked[:5])) == together[5:] + together[:5]
    reseeded = [replace(request, seed=9000 + index) for index, request in enumerate(asked)]
    assert not set(ids(backend.generate(reseeded))) & set(together)
    backend.close()


def without_it(stream: Any) -> Any:
    return (pair for pair in stream if DAMAGED not in pair[0])


def changed(stream: Any) -> Any:
    return ((name, tensor * 1.01 if DAMAGED in name else tensor) for name, tensor in stream)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (without_it, rf"1 of \d+ tensors of policy version 2 did not arrive \(.*{DAMAGED}\.weight\)"),
        (
            changed,
            r"push of policy version 2 .* 1 tensors differ from the trained ones \(.*layers\.0.*qkv_proj",
        ),
    ],
)
def test_a_push_that_arrives_otherwise_is_refused_and_the_next_one_serves(
    server, policy, asked, monkeypatch, fault: Any, says: str
):
    backend = make(server, policy)
    backend.push_policy(1)
    transfer = backend._transfer
    monkeypatch.setattr(backend, "_transfer", lambda stream, version: transfer(fault(stream), version))
    with pytest.raises(RolloutError, match=says):
        backend.push_policy(2)
    with pytest.raises(RolloutError, match="policy version None, but version 2 was announced last"):
        backend.generate(asked[:1])
    monkeypatch.undo()
    backend.push_policy(2)
    assert_same(backend.generate(asked[:2]), by_transformers(policy, asked[:2]), 2)
    backend.close()


def test_the_next_training_takes_the_server_over(server, policy, asked):
    first, second = make(server, policy), make(server, policy)
    first.push_policy(1)
    second.push_policy(1)
    assert len(second.generate(asked[:1])) == 1
    with pytest.raises(RolloutError, match=r"answered 409 to request val:0: .*another training process"):
        first.generate(asked[:1])
    with pytest.raises(
        RolloutError, match=r"answered 409 to the push of policy version 2: .*does not hold the server"
    ):
        first.push_policy(2)
    assert len(second.generate(asked[:1])) == 1
    second.close()
    first.push_policy(3)  # a push after a failure takes the server over again
    assert len(first.generate(asked[:1])) == 1
    first.close()


def test_other_versions_keys_and_bodies_are_refused(server, policy, asked, monkeypatch):
    backend = make(server, policy)
    backend.push_policy(5)
    answer = post(server, "/generate", body_of(asked[0], 5)).json()["rollouts"]
    assert (answer[0]["policy_version"], len(answer[0]["response_token_ids"])) == (5, 4)
    rogue = post(server, "/generate", body_of(asked[0], 6))
    assert rogue.status_code == 409
    assert rogue.json()["error"] == "policy version 6 was asked for, but version 5 is served."
    assert post(server, "/generate", body_of(asked[0], 5), key="wrong").status_code == 401
    assert post(server, "/weights/open", {}, key="").status_code == 401
    bad = post(
        server, "/generate", body_of(asked[0], 5, requests=[{"messages": [], "seed": 1, "request_id": ""}])
    )
    assert bad.status_code == 422
    assert "body.requests.0.messages: List should have at least 1 item" in bad.json()["error"]
    no_image = body_of(asked[0], 5)
    no_image["requests"][0]["images"] = ["bm8gaW1hZ2U="]
    refused = post(server, "/generate", no_image)
    assert (refused.status_code, "val:0 cannot be encoded" in refused.json()["error"]) == (400, True)

    with pytest.raises(RolloutError, match=r"took longer than 0\.001 s \(some\.key\)"):
        backend.generate(asked[:1], time_limit=TimeLimit(0.001, "some.key"))
    assert len(backend.generate(asked[:1])) == 1
    backend.close()
    monkeypatch.setenv(server.api_key_env, "wrong")
    with pytest.raises(RolloutError, match=r"answered 401 .*key is missing or wrong.*api_key_env"):
        make(server, policy).push_policy(6)


@pytest.mark.parametrize(
    ("text", "images", "says"),
    [
        ("What is in <img>{path}</img>?", False, "'<img>'"),
        ("<image>Compare with <video>", True, "'<video>'"),
        ("<image>Compare with <image>", True, "<image> 2 times, but 1 images were given"),
        ("Find all", True, "<image> 0 times, but 1 images were given"),
    ],
)
def test_the_text_of_a_question_names_no_file_and_no_media(
    server, policy, asked, text: str, images: bool, says: str
):
    """Whoever may ask gets no picture that lies on the server's disk."""
    backend = make(server, policy)
    backend.push_policy(5)
    body = body_of(asked[0], 5)
    question = body["requests"][0]
    question["messages"] = [{"role": "user", "content": text.format(path=asked[0].images[0])}]
    question["images"] = question["images"] if images else []
    refused = post(server, "/generate", body)
    assert refused.status_code == 400
    assert refused.json()["error"].startswith(f"request val:0: its text holds {says}")
    assert len(backend.generate(asked[:1])) == 1
    backend.close()


def test_pictures_of_every_kind_are_seen_as_transformers_sees_them(server, policy, tmp_path):
    requests = picture_requests(tmp_path)
    backend = make(server, policy)
    backend.push_policy(1)
    rollouts = backend.generate(requests)
    assert_same(rollouts, by_transformers(policy, requests), 1)
    assert len(set(ids(rollouts))) > len(requests) // 2
    backend.close()


def test_a_head_of_its_own_needs_an_engine_that_keeps_it(server, untied, policy, asked):
    model = policy[0]
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["lm_head"]), model)
    with torch.no_grad():
        model.lm_head.lora_B["default"].weight.normal_(std=0.1)
    with pytest.raises(RolloutError, match="ties the two; restart the server with --own-head"):
        make(server, policy).push_policy(1)
    backend = make(untied, policy)
    backend.push_policy(1)
    assert_same(backend.generate(asked[:4]), by_transformers(policy, asked[:4]), 1)
    backend.close()


def test_answers_do_not_depend_on_the_number_of_servers(server, untied, policy, asked):
    one = make(server, policy, decoding={"temperature": 1.0})
    one.push_policy(1)
    alone = ids(one.generate(asked))
    one.close()
    addresses = [{"base_url": each.base_url, "group_port": each.group_port} for each in (server, untied)]
    keyed = {"mode": "server", "server": {"servers": addresses, "api_key_env": server.api_key_env}}
    section = RolloutMatching(
        backend="vllm", max_new_tokens=48, decode_batch_size=4, decoding={"temperature": 1.0}, vllm=keyed
    )
    both = VllmClientBackend(section, *policy, dtype=torch.float32)
    both.push_policy(2)
    assert ids(both.generate(asked)) == alone
    versions = [
        http.get(each.base_url + "/health", timeout=10).json()["policy_version"] for each in (server, untied)
    ]
    assert versions == [2, 2]
    both.close()


def test_a_busy_port_is_said_before_anything_is_loaded(server, nano_model):
    done = run_coordexp("rollout-server", "--model", nano_model, "--port", server.base_url.rsplit(":", 1)[1])
    assert done.returncode == 2
    assert re.search(r"--port \d+: cannot listen on 127\.0\.0\.1:\d+: Address already in use", done.stderr)


def test_two_ranks_share_the_server(server, policy, asked, nano_model, questions, tmp_path):
    """Rank 0 pushes, each rank asks for its own samples; a push that fails fails on both."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }
    program = Path(__file__).parent / "rollout_server_rank.py"
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program),
            str(nano_model), str(questions), server.base_url, str(server.group_port), server.api_key_env, str(tmp_path),
        ],
        capture_output=True, text=True, env=environment, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    expected = [list(answer) for answer in ids(by_transformers(policy, asked))]
    assert [found[0]["answers"], found[1]["answers"]] == [expected[0::2], expected[1::2]]
    says = "has an engine in float32, the run's torch_dtype is bfloat16. Restart the server with --dtype bfloat16"
    assert says in found[0]["failure"]
    assert found[1]["failure"] == found[0]["failure"] + " (on rank 0)"


def test_a_server_that_is_stopped_leaves_nothing_behind_and_is_named(server, policy, asked):
    """Last: it ends the server of this module."""
    backend = make(server, policy)
    backend.push_policy(1)
    server.process.terminate()
    assert server.process.wait(20) == 0
    with pytest.raises(ProcessLookupError):
        os.killpg(server.process.pid, 0)
    with pytest.raises(RolloutError, match=f"{server.base_url} was lost at request val:0"):
        backend.generate(asked[:1])
    with pytest.raises(RolloutError, match=f"{server.base_url}.* (was lost|broke off)"):
        backend.push_policy(2)
    backend.close()
