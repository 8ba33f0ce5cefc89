"""What goes into a rollout backend and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class RolloutRequest:
    """One question: user messages with `<image>` placeholders, and image paths in their order.

    seed: of this request's sampling; None leaves it to the backend. Greedy decoding and beams do not look at it.
    request_id: what errors call this request; empty for its index.
    """

    messages: tuple[dict[str, str], ...]
    images: tuple[str, ...]
    seed: int | None = None
    request_id: str = ""


@dataclass(frozen=True)
class Rollout:
    """One answer.

    prompt_token_ids: as the model saw them, image placeholders expanded.
    response_token_ids, token_logprobs: same length; log-probabilities under the unprocessed distribution (nats).
        Without log-probabilities (beams, or when not asked for) `token_logprobs` is empty.
    finish_reason: "stop" or "length".
    seconds: wall time of the batch that this answer came from, divided by the batch size.
    policy_version: version of the weights that wrote the answer, as given to `push_policy`; 0 before any push.
    repeat_terminated: whether repeat-aware termination ended the answer.
    """

    prompt_token_ids: tuple[int, ...]
    response_token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    finish_reason: str
    seconds: float
    policy_version: int = 0
    repeat_terminated: bool = False


class RolloutBackend(Protocol):
    """Anything that answers requests, in order."""

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]: ...


class PolicyBackend(RolloutBackend, Protocol):
    """A backend that answers with the weights of a model in training."""

    name: str
    """What `rollout_matching.backend` calls it."""
    policy_version: int
    """Version of the weights that the next answers come from."""

    def push_policy(self, version: int) -> None:
        """From here on answer with the trained weights as they are now, known as `version`; all ranks call it."""
        ...

    def close(self) -> None:
        """Free what the backend holds; called once, after the last answer."""
        ...
