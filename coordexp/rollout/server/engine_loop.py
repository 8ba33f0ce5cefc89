"""A thread that owns a vLLM engine: answers requests of all callers together, and changes weights in between."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from coordexp.errors import CoordExpError, RolloutError
from coordexp.swift_bridge.vllm_engine import stop_engine, submit

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
STOP_S = 10.0


@dataclass(frozen=True)
class _Request:
    inputs: dict[str, Any]
    sampling: Any
    future: Future[Any]


@dataclass(frozen=True)
class _Exclusive:
    function: Callable[[], Any]
    future: Future[Any]


@dataclass(frozen=True)
class _Stop:
    future: Future[Any] = field(default_factory=Future)


class EngineLoop:
    """Starts the engine on a thread of its own and steps it there, in the order in which things were asked for.

    Arguments:
        start: makes the engine (`coordexp.swift_bridge.vllm_engine.build_vllm_engine`); called on the thread, since
            some of what it sets belongs to a thread.

    failure: why the engine serves no more; None while it does.

    Raises what `start` raises.
    """

    def __init__(self, start: Callable[[], Any]) -> None:
        self.failure: str | None = None
        self._lock = threading.Lock()  # of `failure` with the inbox: nothing is put in after the last reading
        self._inbox: queue.SimpleQueue[_Request | _Exclusive | _Stop] = queue.SimpleQueue()
        self._waiting: deque[_Request | _Exclusive | _Stop] = deque()
        self._running: dict[str, Future[Any]] = {}
        self._numbers = itertools.count()
        self._engine: Any = None
        started: Future[Any] = Future()
        self._thread = threading.Thread(target=self._live, args=(start, started), name="engine", daemon=True)
        self._thread.start()
        self.engine = started.result()

    def submit(self, inputs: dict[str, Any], sampling: Any) -> Future[Any]:
        """The finished `RequestOutput` of an encoded conversation. Cancelling the future ends the request.

        The future raises RolloutError when the engine refuses or loses the request, or fails.
        """
        request = _Request(inputs, sampling, Future())
        self._put(request)
        return request.future

    def exclusive(self, function: Callable[[], Result]) -> Result:
        """`function()` on the engine's thread, while no request is running; later requests wait."""
        task = _Exclusive(function, Future())
        self._put(task)
        result: Result = task.future.result()
        return result

    def close(self) -> None:
        """Stop the engine; what is unanswered fails. A second call does nothing. Waits `STOP_S` seconds at most."""
        with suppress(RolloutError):
            self._put(_Stop())
        self._thread.join(STOP_S)

    def _put(self, item: _Request | _Exclusive | _Stop) -> None:
        with self._lock:
            if self.failure is not None:
                raise RolloutError(self.failure)
            self._inbox.put(item)

    # on the thread

    def _live(self, start: Callable[[], Any], started: Future[Any]) -> None:
        try:
            self._engine = start()
        except BaseException as error:  # noqa: BLE001 - the constructor raises it
            started.set_exception(error)
            return
        started.set_result(self._engine)
        try:
            while self._turn():
                pass
            self._end("the engine was stopped.")
        except Exception as error:
            logger.exception("the engine failed")
            self._end(
                f"the engine failed and serves no more: {type(error).__name__}: {error}. Its own message is in the "
                "log of the server; restart the server. Out of memory calls for a lower --gpu-memory-utilization, "
                "--max-num-seqs or --max-model-len."
            )
        finally:
            stop_engine(self._engine)

    def _turn(self) -> bool:
        """Take in what was asked, begin what can begin, step the engine once. False: stop."""
        self._take_in()
        self._abort_cancelled()
        while self._waiting:
            item = self._waiting[0]
            if isinstance(item, _Stop):
                return False
            if isinstance(item, _Exclusive):
                if self._running:
                    break
                _settle(item.future, item.function)
            elif not item.future.cancelled():
                self._begin(item)
            self._waiting.popleft()
        if self._running:
            self._step()
        return True

    def _take_in(self) -> None:
        """Wait for something to do if there is nothing."""
        if not self._running and not self._waiting:
            self._waiting.append(self._inbox.get())
        while not self._inbox.empty():
            self._waiting.append(self._inbox.get())

    def _begin(self, request: _Request) -> None:
        engine_id = f"request-{next(self._numbers)}"
        try:
            submit(self._engine, engine_id, request.inputs, request.sampling)
        except Exception as error:  # noqa: BLE001 - the engine's word on this request, not its end
            refusal = RolloutError(f"the engine does not take the request: {type(error).__name__}: {error}")
            _fail(request.future, refusal)
            return
        self._running[engine_id] = request.future

    def _step(self) -> None:
        for output in self._engine.engine.step():
            if output.finished and output.request_id in self._running:
                future = self._running.pop(output.request_id)
                _settle(future, partial(_itself, output))
        if self._running and not self._engine.engine.has_unfinished_requests():
            for future in self._running.values():
                _fail(future, RolloutError("the engine is idle but never answered the request."))
            self._running.clear()

    def _abort_cancelled(self) -> None:
        cancelled = [engine_id for engine_id, future in self._running.items() if future.cancelled()]
        if cancelled:
            self._engine.engine.abort_request(cancelled)
        for engine_id in cancelled:
            del self._running[engine_id]

    def _end(self, why: str) -> None:
        with self._lock:
            self.failure = why
            while not self._inbox.empty():
                self._waiting.append(self._inbox.get())
        for future in [*self._running.values(), *(item.future for item in self._waiting)]:
            _fail(future, RolloutError(why))


def _itself(output: Any) -> Any:
    return output


def _settle(future: Future[Any], function: Callable[[], Any]) -> None:
    """Give the future what `function` returns or raises; a cancelled one needs neither."""
    try:
        result = function()
    except CoordExpError as error:
        _fail(future, error)
        return
    except Exception as error:
        logger.exception("failed on the engine's thread")
        _fail(future, RolloutError(f"{type(error).__name__}: {error}"))
        return
    try:
        future.set_result(result)
    except InvalidStateError:
        return


def _fail(future: Future[Any], error: CoordExpError) -> None:
    try:
        future.set_exception(error)
    except InvalidStateError:
        return
