"""The rollouts of a step in chunks, the next ones generated while the caller works on those before.

For backends on devices of their own (`rollout_matching.vllm.mode: server`). One thread asks for chunk after chunk,
never more than `ahead` of them beyond the one the caller has. It only waits for the backend: parsing, matching and
training stay on the caller's thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

Chunk = TypeVar("Chunk")
Answers = TypeVar("Answers")


class RolloutStream(Generic[Chunk, Answers]):
    """`generate(chunk)` for each chunk, in order; a context manager.

    Arguments:
        generate: runs in the stream's thread.
        ahead: chunks generated or waiting beyond the one the caller works on.

    wait_s: seconds the caller has waited for answers so far.
    """

    def __init__(self, generate: Callable[[Chunk], Answers], chunks: Sequence[Chunk], *, ahead: int) -> None:
        self.wait_s = 0.0
        self._generate, self._ahead = generate, ahead
        self._coming = iter(chunks)
        self._asked: deque[tuple[Chunk, Future[tuple[Answers, float]]]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rollouts")

    def __enter__(self) -> RolloutStream[Chunk, Answers]:
        self._ask()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """No thread is left: chunks nobody waits for are given up, one in generation is waited for."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[Chunk, Answers, float]]:
        """(chunk, its answers, seconds that generating them took); what `generate` raised is raised here."""
        while self._asked:
            chunk, future = self._asked.popleft()
            started = time.perf_counter()
            answers, seconds = future.result()
            self.wait_s += time.perf_counter() - started
            self._ask()
            yield chunk, answers, seconds

    @property
    def must_wait(self) -> bool:
        """Would the caller now have to wait for the next chunk? False when there is none."""
        return bool(self._asked) and not self._asked[0][1].done()

    def _ask(self) -> None:
        while len(self._asked) < self._ahead:
            try:
                chunk = next(self._coming)
            except StopIteration:
                return
            self._asked.append((chunk, self._pool.submit(self._timed, chunk)))

    def _timed(self, chunk: Chunk) -> tuple[Answers, float]:
        started = time.perf_counter()
        answers = self._generate(chunk)
        return answers, time.perf_counter() - started
