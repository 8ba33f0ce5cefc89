"""Is what a backend returned an answer to what was asked? Every error names request, backend and what to check."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from coordexp.errors import RolloutError
from coordexp.rollout.types import Rollout, RolloutRequest

GENERATE_TIMEOUT_KEY = "rollout_matching.generate_timeout_s"
PREFLIGHT_TIMEOUT_KEY = "rollout_matching.preflight_timeout_s"


@dataclass(frozen=True)
class TimeLimit:
    """Seconds from now that a backend has for what comes next. None: no limit.

    key: the setting that holds the limit.
    """

    seconds: float | None
    key: str
    start: float = field(default_factory=time.monotonic)

    def check(self, backend: str, batch: str) -> None:
        """RolloutError when the time is over."""
        if self.seconds is None or time.monotonic() - self.start <= self.seconds:
            return
        raise RolloutError(
            f"{backend} backend: {batch} took longer than {self.seconds:g} s ({self.key}). Is the device shared with "
            "another process? Lower rollout_matching.decode_batch_size or max_new_tokens, or raise the limit."
        )


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Gives a function that returns the wall time of the block in seconds, afterwards."""
    start, end = time.perf_counter(), 0.0
    yield lambda: end - start
    end = time.perf_counter()


@contextmanager
def encoding(backend: str, request_name: str) -> Iterator[None]:
    """A question that cannot be read or encoded becomes a RolloutError that names it."""
    try:
        yield
    except (OSError, ValueError, TypeError) as error:
        raise RolloutError(
            f"{backend} backend: {request_name} cannot be encoded: {type(error).__name__}: {error}. Check its "
            "image files and that the prompt fits max_length."
        ) from error


def name_of(request: RolloutRequest, index: int) -> str:
    """What errors call a request."""
    return f"request {request.request_id or index}"


def batch_name(requests: Sequence[RolloutRequest]) -> str:
    """What errors call several requests."""
    if not requests:
        return "no request"
    if len(requests) == 1:
        return name_of(requests[0], 0)
    return (
        f"{len(requests)} requests ({name_of(requests[0], 0)} to {name_of(requests[-1], len(requests) - 1)})"
    )


def check_answers(backend: str, requests: Sequence[RolloutRequest], rollouts: Sequence[Rollout]) -> None:
    """RolloutError when there is not one answer for each request, or an answer is no answer."""
    if len(rollouts) != len(requests):
        raise RolloutError(
            f"{backend} backend: {len(rollouts)} answers to {batch_name(requests)}, expected {len(requests)}. Is the "
            "engine still alive, and does nothing else send it requests?"
        )
    for index, (request, rollout) in enumerate(zip(requests, rollouts, strict=True)):
        if not rollout.response_token_ids:
            raise RolloutError(
                f"{backend} backend: the answer to {name_of(request, index)} has no token, not even <|im_end|>; check "
                "that prompt and rollout_matching.max_new_tokens fit rollout_matching.vllm.max_model_len."
            )
        if rollout.token_logprobs and len(rollout.token_logprobs) != len(rollout.response_token_ids):
            raise RolloutError(
                f"{backend} backend: the answer to {name_of(request, index)} has {len(rollout.response_token_ids)} "
                f"tokens but {len(rollout.token_logprobs)} log-probabilities; check the version of the engine."
            )


def check_prompt(backend: str, request_name: str, expected: Sequence[int], found: Sequence[int]) -> None:
    """RolloutError when the engine answered another prompt than the template encodes."""
    if tuple(expected) == tuple(found):
        return
    pairs = zip(expected, found, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))
    ours, theirs = (ids[first] if first < len(ids) else "nothing" for ids in (expected, found))
    raise RolloutError(
        f"{backend} backend: the prompt of {request_name} has {len(found)} tokens in the engine, the template encodes "
        f"{len(expected)}; first difference at position {first}: {theirs} instead of {ours}. Check that the engine "
        "runs the tokenizer and image processor of the trained model, and that image placeholders are expanded once "
        "and images not resized."
    )
