"""A backend with a life: chunks that ranks agree on, one version, one close."""

from __future__ import annotations

import pytest
from support.steps import WrittenAnswers, opened, raw

from coordexp.errors import RolloutError
from coordexp.models.tiny_tokenizer import train_tiny_tokenizer
from coordexp.rollout.session.session import RolloutSession

ANSWER = '{"objects": []}<|im_end|>'


@pytest.fixture(scope="module")
def tok():
    return train_tiny_tokenizer()


@pytest.mark.parametrize(
    ("num_questions", "agreed", "sizes"),
    [
        (5, 3, [2, 2, 1]),
        (1, 3, [1, 0, 0]),  # another rank has more: join its calls with no question
        (0, 2, [0, 0]),
        (0, 0, []),
    ],
)
def test_every_rank_calls_the_backend_as_often_as_the_one_with_most_questions(
    tok, num_questions, agreed, sizes
):
    backend = WrittenAnswers(tok, [ANSWER] * num_questions)
    said = []
    session = opened(backend, agree=lambda own: said.append(own) or agreed, at_once=2)
    questions = [raw(tok, number) for number in range(num_questions)]
    chunks = list(session.generate_all(questions, version=1, seed_base=10, first_index=4))
    assert [len(call) for call in backend.calls] == sizes
    assert said == [-(-num_questions // 2)]
    assert [question for asked, _ in chunks for question in asked] == questions
    assert [request.seed for request in backend.asked] == [14 + index for index in range(num_questions)]


def test_an_answer_of_other_weights_is_refused(tok):
    class Stale(WrittenAnswers):
        def push_policy(self, version):
            """The push is lost."""

    session = opened(Stale(tok, [ANSWER], policy_version=4))
    with pytest.raises(
        RolloutError, match=r"answer to data.jsonl:1 comes from policy version 4, .*are version 5"
    ):
        list(session.generate_all([raw(tok, 1)], version=5, seed_base=0))


def test_weights_are_pushed_once_for_a_version(tok):
    pushes = []

    class Counting(WrittenAnswers):
        def push_policy(self, version):
            pushes.append(version)
            super().push_policy(version)

    session = opened(Counting(tok, [ANSWER] * 4, policy_version=1))
    for version in (1, 2, 2, 3):
        list(session.generate_all([raw(tok, 1)], version=version, seed_base=0))
    assert pushes == [2, 3]


def test_a_closed_session_starts_anew_and_closing_twice_is_nothing(tok):
    backend = WrittenAnswers(tok, [ANSWER])
    session = opened(backend)
    session.close()
    session.close()
    assert backend.closed == 1
    assert not session.is_open


def test_a_backend_that_fails_its_first_question_is_closed(tok):
    class Dumb(WrittenAnswers):
        def generate(self, requests, **options):
            raise RolloutError("written backend: no answer")

    started = []

    def build():
        started.append(Dumb(tok, []))
        return started[-1]

    session = RolloutSession(
        build,
        first_question=lambda: raw(tok, 1),
        template=None,
        preflight_timeout_s=1.0,
        agree=lambda number: number,
    )
    for attempt in (1, 2):
        with pytest.raises(RolloutError, match="no answer"):
            list(session.generate_all([raw(tok, 1)], version=1, seed_base=0))
        assert not session.is_open
        assert [backend.closed for backend in started] == [1] * attempt
