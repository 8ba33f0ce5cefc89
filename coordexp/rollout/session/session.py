"""A rollout backend with a life: started when it is first needed, always at the asked policy version, closed once.

Training steps and evaluations ask one session. How many calls of the backend a pass takes is agreed with all ranks
first, since a call can be collective (a model under ZeRO-3 is gathered for it): a rank with fewer questions joins the
remaining calls with none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

from coordexp.config.schema.rollout import RolloutMatching
from coordexp.control.schedule import request_seed
from coordexp.errors import RolloutError
from coordexp.rollout.backend import PolicyBackend
from coordexp.rollout.session.preflight import preflight
from coordexp.rollout.types import Rollout, RolloutRequest

REQUESTS_AT_ONCE = 256
"""Handed to the backend in one call, so that not all images are in memory together."""


class RolloutQuestion(Protocol):
    """A sample that a model can be asked about."""

    @property
    def sample_id(self) -> str: ...
    @property
    def messages(self) -> tuple[dict[str, str], ...]: ...
    @property
    def images(self) -> tuple[str | bytes, ...]: ...


Q = TypeVar("Q", bound=RolloutQuestion)
Q_co = TypeVar("Q_co", bound=RolloutQuestion, covariant=True)


class Questions(Protocol[Q_co]):
    """Questions that may be made when they are looked at."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Q_co: ...


class RolloutSession:
    """Owner of a backend. All ranks call its methods together.

    Arguments:
        build: makes the backend, on all ranks.
        first_question: what the backend is asked before it is trusted.
        template: of the training run, for the preflight.
        preflight_timeout_s: of the settings.  section: what a run file calls them.
        agree: from this rank's number to the largest of all ranks.
        at_once: questions in one call of the backend.
        pushing: what the time of a weight push is taken with.
    """

    def __init__(
        self,
        build: Callable[[], PolicyBackend],
        *,
        first_question: Callable[[], RolloutQuestion],
        template: Any,
        preflight_timeout_s: float,
        section: str = RolloutMatching.where,
        agree: Callable[[int], int],
        at_once: int = REQUESTS_AT_ONCE,
        pushing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._pushing = pushing
        self._build, self._first_question, self._template = build, first_question, template
        self._preflight_timeout_s, self._section = preflight_timeout_s, section
        self._agree, self._at_once = agree, at_once
        self._backend: PolicyBackend | None = None

    @property
    def is_open(self) -> bool:
        """Is a backend held?"""
        return self._backend is not None

    def start(self) -> None:
        """Start the backend now, unless one is held: what it refuses is told before it is needed."""
        if self._backend is None:
            self._backend = self._start()

    def generate_all(
        self, questions: Questions[Q], *, version: int, seed_base: int, first_index: int = 0
    ) -> Iterator[tuple[list[Q], list[Rollout]]]:
        """Answers to this rank's questions by the policy `version`, some questions at a time, in order.

        seed_base: seed of the step.  first_index: index of the first question among those of all ranks.
        Every chunk must be taken: the other ranks wait.

        Raises:
            RolloutError: the backend does not start, fails, or answers with other weights than those of `version`.
        """
        backend = self._at(version)
        num_chunks = self._agree(-(-len(questions) // self._at_once))
        for chunk in range(num_chunks):
            start = chunk * self._at_once
            asked = [questions[i] for i in range(start, min(start + self._at_once, len(questions)))]
            requests = [
                RolloutRequest(
                    question.messages,
                    question.images,
                    request_seed(seed_base, first_index + start + offset),
                    question.sample_id,
                )
                for offset, question in enumerate(asked)
            ]
            rollouts = backend.generate(requests)
            _check_version(backend, requests, rollouts, version)
            if asked:
                yield asked, rollouts

    def close(self) -> None:
        """Give the backend back; the next question starts a new one."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    def _at(self, version: int) -> PolicyBackend:
        self.start()
        assert self._backend is not None
        if self._backend.policy_version != version:
            with self._pushing():
                self._backend.push_policy(version)
        return self._backend

    def _start(self) -> PolicyBackend:
        """A backend that has answered a first question; one that does not is closed again."""
        backend = self._build()
        try:
            question = self._first_question()
            request = RolloutRequest(question.messages, question.images, request_id=question.sample_id)
            preflight(
                backend, request, self._template, timeout_s=self._preflight_timeout_s, section=self._section
            )
        except BaseException:
            backend.close()
            raise
        return backend


def _check_version(
    backend: PolicyBackend, requests: Sequence[RolloutRequest], rollouts: Sequence[Rollout], version: int
) -> None:
    for request, rollout in zip(requests, rollouts, strict=True):
        if rollout.policy_version != version:
            raise RolloutError(
                f"{backend.name} backend: the answer to {request.request_id} comes from policy version "
                f"{rollout.policy_version}, but the trained weights are version {version}. A weight push was lost; "
                "check the log of the engine."
            )
