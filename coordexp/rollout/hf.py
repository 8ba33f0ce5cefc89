"""Rollouts by transformers' generate, through ms-swift's engine (encoding, batching, left padding)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coordexp.errors import RolloutError
from coordexp.rollout.types import Rollout, RolloutRequest
from coordexp.swift_bridge.engine import generate


@dataclass(frozen=True)
class HfBackend:
    """A `RolloutBackend` around a loaded engine (`coordexp.swift_bridge.engine.load_engine`).

    temperature 0 is greedy decoding. `batch_size` requests are answered at a time.
    """

    engine: Any
    max_new_tokens: int = 1024
    batch_size: int = 16
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """Answers in the order of `requests`; RolloutError when an answer and its log-probabilities disagree."""
        rollouts: list[Rollout] = []
        for start in range(0, len(requests), self.batch_size):
            rollouts += self._generate_batch(requests[start : start + self.batch_size], start)
        return rollouts

    def _generate_batch(self, requests: Sequence[RolloutRequest], first_index: int) -> list[Rollout]:
        started = time.perf_counter()
        generations = generate(
            self.engine,
            [{"messages": list(request.messages), "images": request.images} for request in requests],
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
        )
        seconds = (time.perf_counter() - started) / len(requests)
        for offset, generation in enumerate(generations):
            if len(generation.response_token_ids) != len(generation.token_logprobs):
                raise RolloutError(
                    f"request {first_index + offset} (hf backend): {len(generation.response_token_ids)} tokens but "
                    f"{len(generation.token_logprobs)} log-probabilities; check the installed ms-swift version."
                )
        return [
            Rollout(
                prompt_token_ids=tuple(generation.prompt_token_ids),
                response_token_ids=tuple(generation.response_token_ids),
                token_logprobs=tuple(generation.token_logprobs),
                finish_reason=generation.finish_reason,
                seconds=seconds,
            )
            for generation in generations
        ]
