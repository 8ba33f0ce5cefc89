"""Is what a backend returned an answer to what was asked? Every error names request, backend and what to check."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from coordexp.errors import RecordError, RolloutError
from coordexp.rollout.types import RequestError, Rollout, RolloutRequest


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Gives a function that returns the wall time of the block in seconds, afterwards."""
    start, end = time.perf_counter(), 0.0
    yield lambda: end - start
    end = time.perf_counter()


@contextmanager
def encoding(backend: str, request_name: str) -> Iterator[None]:
    """A question that cannot be read or encoded becomes a RequestError that names it."""
    try:
        yield
    except RecordError as error:
        raise RequestError(f"{backend} backend: {request_name} cannot be encoded: {error}") from error
    except (OSError, ValueError, TypeError) as error:
        raise RequestError(
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
    """RolloutError when there is not one answer for each request, or its tokens and log-probabilities do not fit."""
    if len(rollouts) != len(requests):
        raise RolloutError(
            f"{backend} backend: {len(rollouts)} answers to {batch_name(requests)}, expected {len(requests)}. Is the "
            "engine still alive, and does nothing else send it requests?"
        )
    for index, (request, rollout) in enumerate(zip(requests, rollouts, strict=True)):
        if rollout.token_logprobs and len(rollout.token_logprobs) != len(rollout.response_token_ids):
            raise RolloutError(
                f"{backend} backend: the answer to {name_of(request, index)} has {len(rollout.response_token_ids)} "
                f"tokens but {len(rollout.token_logprobs)} log-probabilities; check the version of the engine."
            )


def refuse_empty(backend: str, requests: Sequence[RolloutRequest], rollouts: Sequence[Rollout]) -> None:
    """RolloutError for an answer without a token: an engine that had room would have written `<|im_end|>`."""
    for index, (request, rollout) in enumerate(zip(requests, rollouts, strict=True)):
        if not rollout.response_token_ids:
            raise RolloutError(
                f"{backend} backend: the answer to {name_of(request, index)} has no token, not even <|im_end|>; check "
                "that prompt and max_new_tokens fit max_model_len."
            )


def refuse_stale(
    backend: str, asked: str, *, announced: int | None, served: str | None, changed: bool
) -> None:
    """RolloutError unless an engine serves the announced version, made of the weights as they are now.

    Arguments:
        asked: the requests (`batch_name`).
        announced: version of the last push, whether it succeeded or not.
        served: version that the engine has, None after a push that failed.
        changed: whether the trained weights are others than those that were pushed.
    """
    asked = f"{backend} backend: {asked}"
    if announced is None:
        raise RolloutError(f"{asked} before any policy was pushed; call push_policy first.")
    if served != str(announced):
        raise RolloutError(
            f"{asked} would be answered by policy version {served}, but version {announced} was announced last. Did "
            "its push fail or never reach the engine?"
        )
    if changed:
        raise RolloutError(
            f"{asked} would be answered by policy version {served}, but the trained weights have changed since it was "
            "pushed. Call push_policy after each optimizer step."
        )


def check_prompt(
    backend: str,
    request_name: str,
    expected: Sequence[int],
    found: Sequence[int],
    text_of: Callable[[Sequence[int]], str] | None = None,
) -> None:
    """RolloutError when the engine answered another prompt than the template encodes.

    text_of: writes ids as the text that the error shows of both.
    """
    if tuple(expected) == tuple(found):
        return
    pairs = zip(expected, found, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))
    ours, theirs = (ids[first] if first < len(ids) else "nothing" for ids in (expected, found))
    raise RolloutError(
        f"{backend} backend: the prompt of {request_name} has {len(found)} tokens in the engine, the template encodes "
        f"{len(expected)}; first difference at position {first}: {theirs} instead of {ours}."
        + (
            ""
            if text_of is None
            else f" The engine: {text_of(found)!r}. The template: {text_of(expected)!r}."
        )
        + " Check that the engine runs the tokenizer, chat template and image processor of the trained model, and that "
        "image placeholders are expanded once and images not resized."
    )
