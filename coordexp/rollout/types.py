"""What goes into a rollout backend and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class RolloutRequest:
    """One question: user messages with `<image>` placeholders, and image paths in their order."""

    messages: tuple[dict[str, str], ...]
    images: tuple[str, ...]


@dataclass(frozen=True)
class Rollout:
    """One answer.

    prompt_token_ids: as the model saw them, image placeholders expanded.
    response_token_ids, token_logprobs: same length; log-probabilities under the unprocessed distribution (nats).
    finish_reason: "stop" or "length".
    seconds: wall time of the batch that this answer came from, divided by the batch size.
    """

    prompt_token_ids: tuple[int, ...]
    response_token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    finish_reason: str
    seconds: float


class RolloutBackend(Protocol):
    """Anything that answers requests, in order."""

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]: ...
