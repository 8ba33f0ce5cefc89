"""One thread around an engine: requests of several callers run together, exclusive work alone, failures reach all."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from coordexp.errors import RolloutError
from coordexp.rollout.server.engine_loop import EngineLoop


class CountingEngine:
    """Answers each request after as many steps as its `sampling` says; shaped like ms-swift's engine around vLLM's."""

    def __init__(self) -> None:
        self.engine = self
        self.engine_core = self
        self.thread = threading.current_thread()
        self.left: dict[str, int] = {}
        self.most_running = 0
        self.num_steps = 0
        self.aborted: list[str] = []
        self.dies_at_step: int | None = None
        self.stopped = False

    def _add_request(self, inputs: dict[str, Any], sampling: int, request_id: str) -> None:
        assert threading.current_thread() is self.thread
        if sampling <= 0:
            raise ValueError("nothing to generate")
        self.left[request_id] = sampling

    def step(self) -> list[Any]:
        assert threading.current_thread() is self.thread
        time.sleep(0.001)
        self.num_steps += 1
        if self.num_steps == self.dies_at_step:
            raise MemoryError("out of memory")
        self.most_running = max(self.most_running, len(self.left))
        self.left = {request_id: steps - 1 for request_id, steps in self.left.items()}
        done = [request_id for request_id, steps in self.left.items() if steps == 0]
        for request_id in done:
            del self.left[request_id]
        return [SimpleNamespace(request_id=request_id, finished=True) for request_id in done]

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def abort_request(self, request_ids: list[str]) -> None:
        self.aborted += request_ids
        for request_id in request_ids:
            self.left.pop(request_id, None)

    def shutdown(self) -> None:
        self.stopped = True


@pytest.fixture
def loop() -> Any:
    made = EngineLoop(CountingEngine)
    yield made
    made.close()
    assert made.engine.stopped


def test_requests_of_several_callers_run_together(loop):
    with ThreadPoolExecutor(8) as pool:
        futures = list(pool.map(lambda steps: loop.submit({}, steps), [60 + 5 * index for index in range(8)]))
    outputs = [future.result(10) for future in futures]
    assert len({output.request_id for output in outputs}) == 8
    assert loop.engine.most_running == 8
    assert loop.engine.num_steps < 150  # one after the other would be 620


def test_exclusive_work_waits_for_what_runs_and_holds_back_what_comes(loop):
    first = loop.submit({}, 50)
    seen: list[Any] = []

    def alone() -> str:
        seen.append((first.done(), dict(loop.engine.left), threading.current_thread() is loop.engine.thread))
        return "loaded"

    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(loop.exclusive, alone)
        time.sleep(0.01)
        second = loop.submit({}, 5)
        assert task.result(10) == "loaded"
        assert second.result(10).finished
    assert seen == [(True, {}, True)]


def test_exclusive_work_that_fails_ends_nothing(loop):
    def fails() -> None:
        raise KeyError("lm_head.weight")

    with pytest.raises(RolloutError, match=r"KeyError: 'lm_head.weight'"):
        loop.exclusive(fails)
    assert loop.failure is None
    assert loop.submit({}, 2).result(10).finished


def test_a_request_that_the_engine_refuses_fails_alone(loop):
    other = loop.submit({}, 30)
    with pytest.raises(RolloutError, match="does not take the request: ValueError: nothing to generate"):
        loop.submit({}, 0).result(10)
    assert other.result(10).finished


def test_a_lost_request_is_told(loop):
    future = loop.submit({}, 10**6)
    loop_engine = loop.engine
    time.sleep(0.01)
    loop_engine.left.clear()
    with pytest.raises(RolloutError, match="idle but never answered"):
        future.result(10)


def test_a_cancelled_request_leaves_the_engine(loop):
    future = loop.submit({}, 10**6)
    time.sleep(0.02)
    assert future.cancel()
    with pytest.raises(CancelledError):
        future.result()
    assert loop.exclusive(lambda: loop.engine.left) == {}
    assert len(loop.engine.aborted) == 1


def test_an_engine_that_dies_fails_everybody_and_serves_no_more(loop):
    loop.engine.dies_at_step = 30
    futures = [loop.submit({}, 1000) for _ in range(3)]
    for future in futures:
        with pytest.raises(
            RolloutError, match=r"failed and serves no more: MemoryError: out of memory.*restart"
        ):
            future.result(10)
    assert "MemoryError" in (loop.failure or "")
    with pytest.raises(RolloutError, match="serves no more"):
        loop.submit({}, 1)
    with pytest.raises(RolloutError, match="serves no more"):
        loop.exclusive(lambda: None)


def test_closing_fails_what_runs():
    loop = EngineLoop(CountingEngine)
    future = loop.submit({}, 10**6)
    loop.close()
    with pytest.raises(RolloutError, match="was stopped"):
        future.result(10)
    loop.close()


def test_an_engine_that_does_not_start_says_so():
    def start() -> Any:
        raise OSError("no such checkpoint")

    with pytest.raises(OSError, match="no such checkpoint"):
        EngineLoop(start)
