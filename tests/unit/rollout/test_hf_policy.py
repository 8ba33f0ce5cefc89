"""The model in training answers: as plain generate would, each request from its own seed, nothing disturbed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from coordexp.config.schema.rollout import RolloutMatching
from coordexp.errors import DeviceMemoryError, RolloutError
from coordexp.rollout.backends.hf import HfBackend
from coordexp.rollout.session.preflight import preflight
from coordexp.rollout.time_limit import TimeLimit
from coordexp.rollout.types import Rollout, RolloutRequest
from coordexp.swift_bridge.generation_prompts import collate_questions, encode_question, questions_template

SAMPLED = {"decoding": {"temperature": 1.0}}


def backend_of(policy: Any, **values: Any) -> HfBackend:
    settings = RolloutMatching(**{"backend": "hf", "decode_batch_size": 4, "max_new_tokens": 12, **values})
    return HfBackend(settings, policy.model, policy.template)


def answers(rollouts: Sequence[Rollout]) -> list[tuple[int, ...]]:
    return [rollout.response_token_ids for rollout in rollouts]


def plain_generate(policy: Any, request: RolloutRequest, **config: Any) -> list[int]:
    """transformers alone, one request."""
    questions = questions_template(policy.template, policy.model)
    batch = collate_questions(
        questions, [encode_question(questions, request.messages, request.images)], policy.model.device
    )
    config = GenerationConfig(max_new_tokens=12, do_sample=False, use_cache=True, **config)
    with torch.no_grad():
        ids = policy.model.eval().generate(**batch, generation_config=config)
    policy.model.train()
    return ids[0, batch["input_ids"].shape[1] :].tolist()


def test_greedy_answers_are_those_of_plain_generate(policy, requests):
    rollouts = backend_of(policy).generate(requests)
    assert answers(rollouts) == [tuple(plain_generate(policy, request)) for request in requests]
    assert [len(rollout.prompt_token_ids) for rollout in rollouts] == [33, 35, 37, 33, 35, 37, 33]
    assert all(rollout.finish_reason == "length" and not rollout.token_logprobs for rollout in rollouts)


def test_beam_answers_are_those_of_plain_generate(policy, requests):
    rollouts = backend_of(policy, decode_mode="beam", num_beams=3).generate(requests[:3])
    assert answers(rollouts) == [tuple(plain_generate(policy, r, num_beams=3)) for r in requests[:3]]


@pytest.mark.parametrize(
    "decoding",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 20},
    ],
)
def test_an_answer_depends_on_its_seed_and_not_on_chunks_or_neighbours(policy, requests, decoding):
    whole = answers(backend_of(policy, decode_batch_size=16, decoding=decoding).generate(requests))
    chunks = answers(backend_of(policy, decode_batch_size=3, decoding=decoding).generate(requests))
    turned = answers(backend_of(policy, decoding=decoding).generate(requests[::-1]))
    assert whole == chunks == turned[::-1]
    others = [replace(request, seed=(request.seed or 0) + 500) for request in requests]
    changed = answers(backend_of(policy, decoding=decoding).generate(others))
    assert all(a != b for a, b in zip(whole, changed, strict=True))


def test_requests_without_a_seed_get_different_answers_and_leave_the_global_stream_alone(policy, requests):
    unseeded = [replace(requests[0], seed=None)] * 4
    torch.manual_seed(1)
    before = torch.get_rng_state()
    found = answers(backend_of(policy, **SAMPLED).generate(unseeded))
    assert torch.equal(before, torch.get_rng_state())
    assert len(set(found)) == 4


def test_log_probabilities_are_those_of_a_teacher_forced_forward(policy, requests):
    backend = backend_of(policy, **SAMPLED, repetition_penalty=1.2)
    backend.token_logprobs = True
    for request, rollout in zip(requests[:5], backend.generate(requests[:5]), strict=True):
        questions = questions_template(policy.template, policy.model)
        encoded = encode_question(questions, request.messages, request.images)
        prompt, response = list(rollout.prompt_token_ids), list(rollout.response_token_ids)
        assert encoded["input_ids"] == prompt
        ids = torch.tensor([prompt + response])
        types = torch.cat([encoded["mm_token_type_ids"], torch.zeros(len(response), dtype=torch.int64)])[None]
        with torch.no_grad():
            logits = policy.model.eval()(
                input_ids=ids, mm_token_type_ids=types, pixel_values=encoded["pixel_values"],
                image_grid_thw=encoded["image_grid_thw"], use_cache=False,
            ).logits[0, len(prompt) - 1 : -1]  # fmt: skip
        policy.model.train()
        expected = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).flatten()
        torch.testing.assert_close(torch.tensor(rollout.token_logprobs), expected, rtol=0, atol=2e-5)


def test_the_model_and_the_template_are_given_back_as_they_were(policy, requests):
    model, template = policy.model, policy.template
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.model.visual.eval()
    flags = {name: module.training for name, module in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    backend_of(policy, **SAMPLED).generate(requests[:2])
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert template.mode == "train"
    assert model.config.use_cache is False
    assert model.is_gradient_checkpointing
    assert model.model.rope_deltas is None
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_training_step_after_a_rollout_equals_one_without(policy, requests):
    def loss_and_grad(rollout_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        policy.model.zero_grad()
        if rollout_first:
            backend_of(policy, **SAMPLED).generate(requests[:3])
        ids = torch.randint(300, (2, 9))
        loss = torch.nn.functional.dropout(policy.model(input_ids=ids).logits, 0.5).logsumexp(-1).mean()
        loss.backward()
        return loss.detach(), policy.model.get_input_embeddings().weight.grad.clone()

    for with_rollout, without in zip(loss_and_grad(True), loss_and_grad(False), strict=True):
        assert torch.equal(with_rollout, without)


def test_a_model_forced_into_repetition_is_ended(policy, requests):
    """Hidden states of zero make all logits equal, so the greedy answer is token 0 for ever."""
    with torch.no_grad():
        policy.model.model.language_model.norm.weight.zero_()
    rules = {"enabled": True, "min_new_tokens": 4, "max_consecutive_token_repeats": 6}
    plain = backend_of(policy, max_new_tokens=20).generate(requests[:2])
    assert [len(r.response_token_ids) for r in plain] == [20, 20]
    assert all(len(set(r.response_token_ids)) == 1 and not r.repeat_terminated for r in plain)
    backend = backend_of(policy, max_new_tokens=20, repeat_terminate=rules)
    for rollout in backend.generate(requests[:2]):
        assert len(rollout.response_token_ids) == 7
        assert rollout.response_token_ids[-1] == backend.end_id
        assert rollout.finish_reason == "stop"
        assert rollout.repeat_terminated


def test_an_answer_ends_with_its_first_stop_token(policy, requests):
    backend = backend_of(policy)
    long = backend.generate(requests[:4])
    stop = long[0].response_token_ids[1]
    backend._stop_ids = (*backend._stop_ids, stop)
    for before, after in zip(long, backend.generate(requests[:4]), strict=True):
        ids = list(before.response_token_ids)
        assert list(after.response_token_ids) == (ids[: ids.index(stop) + 1] if stop in ids else ids)
        assert after.finish_reason == ("stop" if stop in ids else "length")


def test_versions_are_written_into_answers(policy, requests):
    backend = backend_of(policy)
    backend.push_policy(12)
    assert [rollout.policy_version for rollout in backend.generate(requests[:2])] == [12, 12]


# --- errors ---


def test_an_unreadable_image_is_named(policy, requests):
    broken = replace(requests[1], images=("no/such.png",))
    with pytest.raises(RolloutError, match=r"hf backend: request val:1 cannot be encoded.*no/such\.png"):
        backend_of(policy).generate([requests[0], broken])
    assert policy.model.training
    assert policy.template.mode == "train"


def test_a_batch_that_takes_too_long_is_stopped(policy, requests):
    with pytest.raises(
        RolloutError, match=r"request val:0 to request val:1.* longer than 1e-06 s .*generate_timeout_s"
    ):
        backend_of(policy, generate_timeout_s=1e-6).generate(requests[:2])
    with pytest.raises(RolloutError, match=r"some_key"):
        backend_of(policy).generate(requests[:1], time_limit=TimeLimit(0.0, "some_key"))


class Damaged(HfBackend):
    """A real backend whose answers are changed on their way back."""

    damage: Any = staticmethod(lambda rollouts: rollouts)

    def _answers(self, *args: Any) -> list[Rollout]:
        return self.damage(super()._answers(*args))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda r: [replace(r[0], prompt_token_ids=(*r[0].prompt_token_ids[:6], 7))],
            r"the prompt of request val:0 \(preflight\) has 7 tokens in the engine, the template encodes 33; first "
            r"difference at position 6: 7 instead of \d+\. The engine: '<\|im_start\|>user.*'\. The template: "
            r"'<\|im_start\|>user\\n<\|vision_start\|><\|image_pad\|><\|vision_end\|>Find<\|im_end\|>.*placeholders",
        ),
        (lambda r: [], r"hf backend: 0 answers to request val:0, expected 1"),
        (lambda r: [replace(r[0], response_token_ids=())], r"the answer to request val:0 has no token"),
    ],
)
def test_the_preflight_stops_a_backend_that_answers_something_else(policy, requests, damage, says):
    backend = Damaged(RolloutMatching(backend="hf"), policy.model, policy.template)
    backend.damage = damage
    with pytest.raises(RolloutError, match=says):
        preflight(backend, requests[0], policy.template)


def test_the_preflight_passes_a_sound_backend(policy, requests):
    rollout = preflight(backend_of(policy), requests[0], policy.template)
    assert len(rollout.response_token_ids) == 4
    assert policy.template.mode == "train"


@pytest.mark.parametrize("values", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_memory_that_runs_out_halves_the_batch_and_changes_no_answer(policy, requests, values):
    """A forward over more than 2 questions fails, as a full device would; seeds are given or left to the backend."""
    asked = [replace(request, seed=None if i % 2 else i) for i, request in enumerate(requests)]
    expected = answers(backend_of(policy, **values).generate(asked))
    retries: list[int] = []
    settings = RolloutMatching(backend="hf", decode_batch_size=4, max_new_tokens=12, **values)
    backend = HfBackend(settings, policy.model, policy.template, on_retry=lambda: retries.append(1))
    sizes: list[int] = []

    def allocate(_module, _args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("no room for the cache")

    handle = policy.model.register_forward_pre_hook(allocate, with_kwargs=True)
    try:
        assert answers(backend.generate(asked)) == expected
        assert (len(retries), sizes.count(4), max(sizes[1:])) == (1, 1, 2)
        handle.remove()
        handle = policy.model.register_forward_pre_hook(_full, with_kwargs=True)
        with pytest.raises(DeviceMemoryError, match=r"pieces of 2 and of 1 .*rollout_matching.decode_batch"):
            backend.generate(asked)
    finally:
        handle.remove()
    assert policy.model.training


def _full(_module, _args, _kwargs):
    raise torch.OutOfMemoryError("full")
