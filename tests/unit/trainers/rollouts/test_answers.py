"""From questions to targets, with answers written by hand."""

from __future__ import annotations

import pytest
from support.steps import WrittenAnswers, assembly, box, raw, teacher

from coordexp.codec.serialize import serialize
from coordexp.config.schema.rollout import Decoding, Matching, RolloutMatching
from coordexp.models.tiny_tokenizer import train_tiny_tokenizer
from coordexp.rollout.types import Rollout
from coordexp.targets import DroppedSample, TargetBuilder
from coordexp.trainers.rollouts.answers import AnswerJudge
from coordexp.trainers.rollouts.metrics import rollout_metrics
from coordexp.trainers.step.planners import RolloutPlanner

CAT, DOG = box("cat", 100, 100, 300, 300), box("dog", 500, 500, 800, 800)


@pytest.fixture(scope="module")
def tok():
    return train_tiny_tokenizer()


def test_answers_become_prefix_and_missed_objects(tok):
    backend = WrittenAnswers(tok, [serialize([CAT]) + "<|im_end|>", "no idea<|im_end|>"])
    rolled_out = teacher(tok, backend)([raw(tok, 1, CAT, DOG), raw(tok, 2, DOG)], 0)
    texts = [sample.target_text for sample in rolled_out.samples]
    assert texts == [serialize([CAT, DOG]) + "<|im_end|>", serialize([DOG]) + "<|im_end|>"]
    assert [answer.match.matched for answer in rolled_out.answers] == [[(0, 0)], []]
    assert not any(isinstance(outcome.sample, DroppedSample) for outcome in rolled_out.outcomes)
    assert min(rolled_out.generate_s, rolled_out.parse_match_s, rolled_out.encode_s) >= 0


def test_every_request_has_its_name_and_a_seed_of_its_own(tok):
    backend = WrittenAnswers(tok, [serialize([]) + "<|im_end|>"] * 2)
    teacher(tok, backend, first_index=3)([raw(tok, 1, CAT), raw(tok, 2, DOG)], 2)
    assert backend.policy_version == 3  # pushed: the weights after two steps
    assert [request.request_id for request in backend.asked] == ["data.jsonl:1", "data.jsonl:2"]
    base = 7 + 2 * 1_000_003
    assert [request.seed for request in backend.asked] == [base + 3, base + 4]


def test_evaluation_can_match_at_another_gate(tok):
    wide = box("cat", 100, 100, 300, 400)  # IoU 2 / 3 with the cat
    sample = raw(tok, 1, CAT)
    rollout = Rollout((), tuple(tok.encode(serialize([wide]), add_special_tokens=False)), (), "stop", 0.0)
    judge = AnswerJudge(tok, Matching(maskiou_gate=0.3))
    assert judge(sample, rollout).match.matched == [(0, 0)]
    assert judge(sample, rollout, gate=0.75).match.matched == []


def test_several_answers_to_a_question_are_samples_of_their_own(tok):
    end = "<|im_end|>"
    written = [serialize([CAT]) + end, serialize([DOG]) + end, "no idea" + end, serialize([]) + end]
    backend = WrittenAnswers(tok, written)
    raws = [raw(tok, 1, CAT, DOG), raw(tok, 2, DOG)]
    rolled_out = teacher(tok, backend, first_index=3, num_answers=2)(raws, 0)
    assert [request.request_id for request in backend.asked] == ["data.jsonl:1"] * 2 + ["data.jsonl:2"] * 2
    assert [request.seed for request in backend.asked] == [
        7 + 6,
        7 + 7,
        7 + 8,
        7 + 9,
    ]  # of question 3 on: two each
    texts = [sample.target_text for sample in rolled_out.samples]
    assert texts == [serialize(found) + end for found in ([CAT, DOG], [DOG, CAT], [DOG], [DOG])]
    assert [sample.sample_id for sample in rolled_out.samples] == [r.request_id for r in backend.asked]


def test_the_best_answer_to_each_question_may_be_taught_alone(tok):
    end = "<|im_end|>"
    far = box("cat", 700, 0, 900, 90)
    written = [[DOG], [CAT, DOG, far], [CAT, DOG], [far], [], []]
    backend = WrittenAnswers(tok, [serialize(found) + end for found in written])
    raws = [raw(tok, 1, CAT, DOG), raw(tok, 2, DOG)]
    rolled_out = teacher(tok, backend, num_answers=3, teaches_best=True)(raws, 0)
    assert rolled_out.taught == [2, 4]  # most matched, then fewest others, then the first
    assert [sample.target_text for sample in rolled_out.samples] == [
        serialize([CAT, DOG]) + end,
        serialize([DOG]) + end,
    ]
    assert len(rolled_out.outcomes) == 6  # all of them are counted
    metrics = rollout_metrics(
        rolled_out.outcomes,
        RolloutMatching(num_return_sequences=3, decoding=Decoding(temperature=1.0)),
        generate_s=1.0,
        parse_match_s=1.0,
        encode_s=1.0,
    )
    assert metrics["rollout/oracle_recall"] == (2.0, 3.0)
    assert metrics["rollout/recall"] == (5.0, 9.0)


def test_every_answer_of_a_step_is_taught_on(tok):
    """Twice as many samples in the forwards, and all of them in the counts that losses are divided by."""
    written = [serialize([CAT]) + "<|im_end|>"] * 2
    raws = [raw(tok, 1, CAT)]
    plans = [
        RolloutPlanner(
            teacher(tok, WrittenAnswers(tok, written), num_answers=number),
            TargetBuilder(tok),
            assembly(tok, 400),
        )(raws, 0)
        for number in (1, 2)
    ]
    assert [sum(f.meta.num_samples for f in plan.forwards) for plan in plans] == [1, 2]
    one, two = (plan.totals for plan in plans)
    assert {name: float(total) for name, total in two.items()} == {
        n: 2 * float(total) for n, total in one.items()
    }
