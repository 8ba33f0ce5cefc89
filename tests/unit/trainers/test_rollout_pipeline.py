"""The pipeline from questions to targets, with answers written by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from coordexp.codec.schema import BoxObject
from coordexp.codec.serialize import serialize
from coordexp.config.schema.rollout import Matching
from coordexp.data.raw_samples import RawSample
from coordexp.errors import RolloutError
from coordexp.models.tiny_tokenizer import train_tiny_tokenizer
from coordexp.rollout.types import Rollout, RolloutRequest
from coordexp.targets import DroppedSample
from coordexp.targets.builder import TargetBuilder
from coordexp.trainers.rollout_pipeline import RolloutPipeline

PROMPT = "What is there?"


class WrittenAnswers:
    """A backend whose answers are given; keeps what it was asked."""

    name = "written"

    def __init__(self, tok, answers: Sequence[str], policy_version: int = 1) -> None:
        self.tok, self.answers, self.policy_version = tok, list(answers), policy_version
        self.asked: list[RolloutRequest] = []

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        self.asked += requests
        prompt = tuple(self.tok.encode(PROMPT, add_special_tokens=False))
        answers = [
            tuple(self.tok.encode(text, add_special_tokens=False)) for text in self.answers[: len(requests)]
        ]
        return [Rollout(prompt, ids, (), "stop", 0.0, self.policy_version) for ids in answers]


@pytest.fixture(scope="module")
def tok():
    return train_tiny_tokenizer()


def box(desc: str, *bins: int) -> BoxObject:
    return BoxObject(desc, "bbox_2d", bins)


def raw(tok, number: int, *objects: BoxObject) -> RawSample:
    ids = tuple(tok.encode(PROMPT, add_special_tokens=False))
    question = ({"role": "user", "content": PROMPT},)
    return RawSample(f"data.jsonl:{number}", "shapes", ids, None, objects, question, (), 64, 64)


def pipeline(tok, backend: WrittenAnswers, **matching) -> RolloutPipeline:
    return RolloutPipeline(backend, TargetBuilder(tok), tok, Matching(**matching))


CAT, DOG = box("cat", 100, 100, 300, 300), box("dog", 500, 500, 800, 800)


def test_answers_become_prefix_and_missed_objects(tok):
    backend = WrittenAnswers(tok, [serialize([CAT]) + "<|im_end|>", "no idea<|im_end|>"])
    raws = [raw(tok, 1, CAT, DOG), raw(tok, 2, DOG)]
    rolled_out = pipeline(tok, backend).run(raws, version=1, seed_base=7, first_index=0)
    texts = [sample.target_text for sample in rolled_out.samples]
    assert texts == [serialize([CAT, DOG]) + "<|im_end|>", serialize([DOG]) + "<|im_end|>"]
    assert [answer.match.matched for answer in rolled_out.answers] == [[(0, 0)], []]
    assert not any(isinstance(outcome.sample, DroppedSample) for outcome in rolled_out.outcomes)
    assert min(rolled_out.generate_s, rolled_out.parse_match_s, rolled_out.encode_s) >= 0


def test_every_request_has_its_name_and_a_seed_of_its_own(tok):
    backend = WrittenAnswers(tok, [serialize([]) + "<|im_end|>"] * 2)
    raws = [raw(tok, 1, CAT), raw(tok, 2, DOG)]
    pipeline(tok, backend).run(raws, version=1, seed_base=0x7FFFFFFF, first_index=3)
    assert [request.request_id for request in backend.asked] == ["data.jsonl:1", "data.jsonl:2"]
    assert [request.seed for request in backend.asked] == [2, 3]  # (base + 3) and (base + 4), modulo 2^31


def test_an_answer_of_other_weights_is_refused(tok):
    backend = WrittenAnswers(tok, [serialize([CAT]) + "<|im_end|>"], policy_version=4)
    with pytest.raises(
        RolloutError, match=r"answer to data.jsonl:1 comes from policy version 4, .*are version 5"
    ):
        pipeline(tok, backend).run([raw(tok, 1, CAT)], version=5, seed_base=0, first_index=0)


def test_evaluation_can_match_at_another_gate(tok):
    backend = WrittenAnswers(tok, [])
    wide = box("cat", 100, 100, 300, 400)  # IoU 2 / 3 with the cat
    sample = raw(tok, 1, CAT)
    rollout = Rollout((), tuple(tok.encode(serialize([wide]), add_special_tokens=False)), (), "stop", 0.0)
    judge = pipeline(tok, backend, maskiou_gate=0.3).judge
    assert judge(sample, rollout).match.matched == [(0, 0)]
    assert judge(sample, rollout, gate=0.75).match.matched == []
