"""Requests through a vLLM engine in this process: in, stepped until done, out."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TypeVar

from vllm import RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind

from coordexp.codec.pieces import TokenPieces
from coordexp.config.schema.rollout import RepeatTerminate, RolloutMatching
from coordexp.errors import CoordExpError, RolloutError
from coordexp.rollout.checks import batch_name, check_prompt, encoding, name_of
from coordexp.rollout.decoding.guided import GuideRules, finish_reason
from coordexp.rollout.decoding.repetition import was_terminated
from coordexp.rollout.decoding.vllm_guided import EXTRA_ARG as GUIDED_ARG
from coordexp.rollout.decoding.vllm_readout import EXTRA_ARG as READOUT_ARG
from coordexp.rollout.decoding.vllm_repetition import EXTRA_ARG as REPEAT_ARG
from coordexp.rollout.time_limit import TimeLimit
from coordexp.rollout.types import RequestError, Rollout, RolloutRequest
from coordexp.swift_bridge.vllm_engine import MAX_IMAGES, encode_for_vllm, submit

ENCODING_THREADS = 4
Submit = Callable[[str, RolloutRequest, dict[str, Any], SamplingParams], None]
"""Queues a question: its id in the engine, what it asks, what `encode_request` made of it, how it is answered."""
Item = TypeVar("Item")
Result = TypeVar("Result")


def sampling_params(
    settings: RolloutMatching,
    *,
    max_new_tokens: int,
    seed: int,
    stop_ids: Sequence[int],
    end_id: int,
    logprobs: bool,
    guide: GuideRules | None = None,
) -> SamplingParams:
    """What the settings ask of one request. Text is not decoded in the engine; only its token ids are used.

    guide: the rules of a guided answer, which read its coordinates and end its repetition too.
    """
    decoding, rules = settings.decoding, settings.repeat_terminate
    extra: dict[str, Any] = {} if guide is None else {GUIDED_ARG: asdict(guide)}
    if rules.enabled and guide is None:
        extra[REPEAT_ARG] = rules.model_dump() | {"end_id": end_id}
    if decoding.coord != "argmax" and guide is None:
        extra[READOUT_ARG] = decoding.coord
    return SamplingParams(
        max_tokens=max_new_tokens,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        top_k=decoding.top_k if decoding.top_k > 0 else -1,
        repetition_penalty=settings.repetition_penalty,
        seed=seed,
        stop_token_ids=list(stop_ids),
        logprobs=0 if logprobs else None,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=extra or None,
    )


def encode_request(engine: Any, backend: str, name: str, request: RolloutRequest) -> dict[str, Any]:
    """A question as the engine takes it; RequestError when it cannot be encoded."""
    if len(request.images) > MAX_IMAGES:
        raise RequestError(
            f"{backend} backend: {name} has {len(request.images)} images, the engine takes {MAX_IMAGES}; use "
            "backend hf."
        )
    with encoding(backend, name):
        return encode_for_vllm(engine, request.messages, request.images)


def check_answered_prompt(
    engine: Any, backend: str, name: str, prompt_ids: Sequence[int], output: RequestOutput
) -> None:
    """RolloutError unless the engine has answered what was sent, but for the expanded image placeholders."""
    image_id = engine.template.image_token_id
    sent, found = (_collapsed(ids, image_id) for ids in (prompt_ids, output.prompt_token_ids or ()))
    check_prompt(backend, name, sent, found)


def rollout_of(
    output: RequestOutput,
    *,
    backend: str,
    version: int | None,
    rules: RepeatTerminate,
    stop_ids: Collection[int],
    pieces: TokenPieces,
    seconds: float,
    guide: GuideRules | None = None,
) -> Rollout:
    """A finished output as an answer of policy `version`; RolloutError when other weights wrote it.

    guide: as in `sampling_params`.
    """
    completion = output.outputs[0]
    versions = {span.version for span in completion.weight_versions or ()}
    if versions != {str(version)}:
        raise RolloutError(
            f"{backend} backend: an answer was written by policy versions {sorted(versions)}, expected {version} "
            "alone. Did something push weights while the engine was generating?"
        )
    ids = tuple(completion.token_ids)
    logprobs: Sequence[Any] = completion.logprobs or ()
    return Rollout(
        prompt_token_ids=tuple(output.prompt_token_ids or ()),
        response_token_ids=ids,
        token_logprobs=tuple(
            step[token].logprob for step, token in zip(logprobs, ids, strict=bool(logprobs))
        ),
        finish_reason=finish_reason(ids, stop_ids, guide),
        seconds=seconds,
        policy_version=int(versions.pop()),
        repeat_terminated=was_terminated(
            ids,
            end_id_of(pieces),
            rules if rules.enabled else None,
            pieces.__getitem__,
            guided=guide is not None,
        ),
    )


def end_id_of(pieces: TokenPieces) -> int:
    """Id of `<|im_end|>`, which every template of ours ends an answer with."""
    assert pieces.im_end_id is not None
    return pieces.im_end_id


class RequestRunner:
    """Keeps at most `num_running` requests in the engine, and refills it as answers come out.

    Arguments:
        engine: a GRPOVllmEngine (`coordexp.swift_bridge.vllm_engine.build_vllm_engine`).
        fresh_limit: makes the limit of each next answer, where a call has none.
        submitted_by: None: what was encoded goes to the engine as it is.
    """

    def __init__(
        self,
        engine: Any,
        backend: str,
        *,
        num_running: int,
        fresh_limit: Callable[[], TimeLimit],
        submitted_by: Submit | None = None,
    ) -> None:
        self._engine = engine
        self._backend = backend
        self._num_running = num_running
        self._fresh_limit = fresh_limit
        self._submit: Submit = submitted_by or self._as_it_is
        self._numbers = itertools.count()

    def run(
        self,
        requests: Sequence[RolloutRequest],
        sampling: Callable[[RolloutRequest], SamplingParams],
        time_limit: TimeLimit | None = None,
    ) -> list[RequestOutput]:
        """Finished outputs in the order of `requests`.

        time_limit: of the whole call; None gives each next answer one of its own.

        Raises:
            RolloutError: the engine fails, loses a request, takes too long, or answers another prompt.
        """
        running: dict[str, tuple[int, list[int]]] = {}  # id in the engine -> index of the request, its prompt
        outputs: dict[int, RequestOutput] = {}
        names = [name_of(request, index) for index, request in enumerate(requests)]
        encoded = read_ahead(self._encode, zip(names, requests, strict=True), 2 * self._num_running)
        limit = time_limit or self._fresh_limit()
        try:
            while len(outputs) < len(requests):
                for index, inputs in self._refill(encoded, len(outputs) + len(running), len(running)):
                    engine_id = f"{self._backend}-{next(self._numbers)}"
                    with self.failures(names[index]):
                        self._submit(engine_id, requests[index], inputs, sampling(requests[index]))
                    running[engine_id] = index, inputs["input_ids"]
                waiting = [requests[index] for index, _ in running.values()]
                with self.failures(batch_name(waiting)):
                    finished = [output for output in self._engine.engine.step() if output.finished]
                for output in finished:
                    index, prompt_ids = running.pop(output.request_id)
                    check_answered_prompt(self._engine, self._backend, names[index], prompt_ids, output)
                    outputs[index] = output
                    limit = time_limit or self._fresh_limit()
                limit.check(self._backend, batch_name(waiting))
                if running and not self._engine.engine.has_unfinished_requests():
                    raise RolloutError(
                        f"{self._backend} backend: the engine is idle but never answered {batch_name(waiting)}. Does "
                        "anything else use or abort requests of this engine?"
                    )
        except CoordExpError:
            self._engine.engine.abort_request(list(running))
            raise
        finally:
            encoded.close()
        return [outputs[index] for index in range(len(requests))]

    @contextmanager
    def failures(self, doing: str) -> Iterator[None]:
        """Whatever goes wrong in the engine becomes a RolloutError that names what it was doing."""
        try:
            yield
        except CoordExpError:
            raise
        except Exception as error:
            raise RolloutError(
                f"{self._backend} backend: the engine failed at {doing}: {type(error).__name__}: {error}. Look for its "
                "own message above; out of memory calls for a lower gpu_memory_utilization, "
                "max_num_seqs or decode_batch_size."
            ) from error

    def _refill(
        self, encoded: Iterator[dict[str, Any]], next_index: int, num_running: int
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        return zip(itertools.count(next_index), itertools.islice(encoded, self._num_running - num_running))

    def _as_it_is(
        self, engine_id: str, _request: RolloutRequest, inputs: dict[str, Any], sampling: SamplingParams
    ) -> None:
        submit(self._engine, engine_id, inputs, sampling)

    def _encode(self, named: tuple[str, RolloutRequest]) -> dict[str, Any]:
        name, request = named
        return encode_request(self._engine, self._backend, name, request)


def _collapsed(ids: Iterable[int], image_id: int) -> list[int]:
    """`ids` with each run of image placeholders as one."""
    return [
        token_id
        for token_id, run in itertools.groupby(ids)
        for _ in itertools.islice(run, 1 if token_id == image_id else None)
    ]


def read_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], count: int
) -> Generator[Result, None, None]:
    """`map(function, items)` in threads, up to `count` results ahead of the reader."""
    with ThreadPoolExecutor(ENCODING_THREADS, thread_name_prefix="encode") as pool:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
