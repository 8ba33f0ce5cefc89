"""What every backend is: something that answers requests until it is closed.

A *policy* is the weights of the model in training, with a version; an *engine* is vLLM; a *server* is an engine in a
process of its own, and a *client* the training's side of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from coordexp.errors import RolloutError
from coordexp.rollout.checks import batch_name, check_answers, refuse_empty
from coordexp.rollout.time_limit import TimeLimit
from coordexp.rollout.types import Rollout, RolloutRequest


class RolloutBackend(ABC):
    """Answers requests, in order.

    name: what settings and errors call it.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        self._is_open = True

    @property
    @abstractmethod
    def max_new_tokens(self) -> int:
        """Longest answer, in tokens, where a call does not say."""

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        *,
        max_new_tokens: int | None = None,
        time_limit: TimeLimit | None = None,
    ) -> list[Rollout]:
        """Answers in the order of `requests`.

        max_new_tokens: None takes that of the backend.
        time_limit: of the whole call; None takes what the backend's settings allow for its parts.

        Raises:
            RequestError: a request that cannot be encoded.
            RolloutError: the backend fails, takes too long, gives no answer, or is closed.
        """
        self._refuse_closed(batch_name(requests))
        rollouts = self._answers(requests, max_new_tokens or self.max_new_tokens, time_limit)
        self._check(requests, rollouts)
        return rollouts

    def close(self) -> None:
        """Give back what the backend holds; a second call does nothing."""
        if self._is_open:
            self._is_open = False
            self._release()

    @abstractmethod
    def _answers(
        self, requests: Sequence[RolloutRequest], max_new_tokens: int, time_limit: TimeLimit | None
    ) -> list[Rollout]: ...

    @abstractmethod
    def _release(self) -> None: ...

    def _check(self, requests: Sequence[RolloutRequest], rollouts: Sequence[Rollout]) -> None:
        check_answers(self.name, requests, rollouts)

    def _refuse_closed(self, what: str) -> None:
        if not self._is_open:
            raise RolloutError(
                f"{self.name} backend: {what} came after the backend was closed. A closed backend stays closed; build "
                "a new one."
            )


class PolicyBackend(RolloutBackend):
    """A backend that answers with the weights of the model in training, and every time with some token.

    policy_version: of the weights that the next answers come from; 0 before any push.
    """

    def __init__(self) -> None:
        super().__init__()
        self.policy_version = 0

    def push_policy(self, version: int) -> None:
        """From here on answer with the trained weights as they are now, known as `version`; all ranks call it.

        Raises:
            RolloutError: the backend does not take them, holds others afterwards, or is closed.
        """
        self._refuse_closed(f"the push of policy version {version}")
        self._push(version)

    @abstractmethod
    def _push(self, version: int) -> None: ...

    def _check(self, requests: Sequence[RolloutRequest], rollouts: Sequence[Rollout]) -> None:
        super()._check(requests, rollouts)
        refuse_empty(self.name, requests, rollouts)
