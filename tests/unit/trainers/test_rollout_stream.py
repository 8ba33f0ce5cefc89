"""Chunks of rollouts generated ahead of their reader."""

from __future__ import annotations

import threading

import pytest

from coordexp.trainers.rollout_stream import RolloutStream

SOON = 10.0  # seconds that nothing here takes unless it hangs


class Engine:
    """Answers a chunk when it is told to; knows which chunks were asked for."""

    def __init__(self, num_chunks: int) -> None:
        self.may_answer = [threading.Event() for _ in range(num_chunks)]
        self.started = [threading.Event() for _ in range(num_chunks)]

    def __call__(self, chunk: int) -> str:
        self.started[chunk].set()
        assert self.may_answer[chunk].wait(SOON)
        return f"answer {chunk}"


def test_answers_come_in_order_with_their_chunks():
    with RolloutStream(lambda chunk: chunk * chunk, [3, 1, 2], ahead=2) as stream:
        assert [(chunk, answer) for chunk, answer, _ in stream] == [(3, 9), (1, 1), (2, 4)]
        assert not stream.must_wait


def test_the_next_chunk_is_generated_while_the_first_is_worked_on():
    engine = Engine(2)
    engine.may_answer[0].set()
    with RolloutStream(engine, [0, 1], ahead=1) as stream:
        reader = iter(stream)
        assert next(reader)[:2] == (0, "answer 0")
        assert engine.started[1].wait(SOON)
        assert stream.must_wait
        engine.may_answer[1].set()
        assert next(reader)[:2] == (1, "answer 1")
        assert not stream.must_wait


def test_no_more_than_ahead_chunks_are_asked_for_beyond_the_one_in_hand():
    asked = []
    with RolloutStream(lambda chunk: asked.append(chunk), range(6), ahead=2) as stream:
        reader = iter(stream)
        for taken in range(1, 5):
            next(reader)
            stream._asked[-1][1].result(SOON)  # everything that was asked for is there
            assert asked == list(range(taken + 2))[:6]


def read(stream: RolloutStream[int, int], fail_after: int | None = None) -> list[int]:
    seen = []
    with stream:
        for chunk, _, _ in stream:
            seen.append(chunk)
            if len(seen) == fail_after:
                raise RuntimeError(f"the reader saw {seen}")
    return seen


def test_what_the_backend_raises_reaches_the_reader_in_its_place():
    def generate(chunk: int) -> int:
        return [10, 20][chunk]

    stream = RolloutStream(generate, [0, 1, 2], ahead=3)
    with pytest.raises(IndexError, match="list index out of range"):
        read(stream)
    with pytest.raises(RuntimeError, match=r"the reader saw \[0, 1\]"):
        read(RolloutStream(generate, [0, 1, 2], ahead=3), fail_after=2)


def test_a_reader_that_fails_leaves_no_thread_and_asks_nothing_more():
    asked: list[int] = []
    stream = RolloutStream(lambda chunk: asked.append(chunk), range(50), ahead=2)
    with pytest.raises(RuntimeError, match=r"the reader saw \[0\]"):
        read(stream, fail_after=1)
    assert len(asked) <= 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rollouts")]
