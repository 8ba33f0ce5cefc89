"""What stands between the logits of transformers' `generate` and the next token, with a random stream per request.

`generate` samples a batch from one stream, so an answer would depend on its neighbours. Here `generate` decodes
greedily, and the last processor adds the noise: with Gumbel noise g on log-probabilities, argmax(log p + g) is an exact
sample of p (Gumbel 1954; Maddison et al. 2014, "A* sampling"). Each row draws its noise from its own seeded generator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from coordexp.config.schema.rollout import Decoding
from coordexp.rollout.time_limit import TimeLimit


class GumbelMax(LogitsProcessor):
    """Turns the argmax that follows into a sample of softmax(scores); row i draws from `seeds[i]`."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: [rows, V], float."""
        noise = torch.empty_like(scores)
        for row, generator in enumerate(self._generators):
            noise[row].exponential_(generator=generator)
        # -log of a standard exponential variable is a standard Gumbel variable
        return scores - noise.clamp_(min=torch.finfo(noise.dtype).tiny).log_()


class RepetitionPenalty(LogitsProcessor):
    """Divides positive and multiplies negative scores of tokens that prompt or answer hold (Keskar et al. 2019, CTRL).

    Unlike the one of transformers it does not take the padding of a shorter prompt for its text.
    """

    def __init__(self, penalty: float, attention_mask: Tensor) -> None:
        self._penalty = penalty
        self._prompt_mask = attention_mask.bool()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: [rows, V]; rows may be beams."""
        beams = input_ids.shape[0] // self._prompt_mask.shape[0]
        answer_length = input_ids.shape[1] - self._prompt_mask.shape[1]
        prompt_mask = self._prompt_mask.repeat_interleave(beams, dim=0)
        held = torch.cat([prompt_mask, prompt_mask.new_ones(input_ids.shape[0], answer_length)], dim=1)
        counts = torch.zeros_like(scores).scatter_add_(1, input_ids, held.to(scores.dtype))
        penalised = torch.where(scores > 0, scores / self._penalty, scores * self._penalty)
        return torch.where(counts > 0, penalised, scores)


class TokenLogprobs(LogitsProcessor):
    """Notes the log-probability of each token that is chosen, under the distribution before all other processors.

    Stands first in the list: it sees the raw logits of a step, and with the next step which token came of them.
    """

    def __init__(self) -> None:
        self._pending_BV: Tensor | None = None
        self._chosen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._note(input_ids[:, -1])
        self._pending_BV = scores.log_softmax(dim=-1)
        return scores

    def finish(self, sequences: Tensor) -> Tensor:
        """Log-probabilities [rows, new tokens] of the answers; `sequences` is what `generate` returned."""
        self._note(sequences[:, -1])
        return torch.stack(self._chosen, dim=1)

    def _note(self, last_ids_B: Tensor) -> None:
        if self._pending_BV is not None:
            self._chosen.append(self._pending_BV.gather(1, last_ids_B.unsqueeze(1)).squeeze(1))
            self._pending_BV = None


class Deadline(StoppingCriteria):
    """Stops `generate` with a RolloutError when a batch takes longer than it may."""

    def __init__(self, limit: TimeLimit, backend: str, batch: str) -> None:
        self._limit, self._backend, self._batch = limit, backend, batch

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        self._limit.check(self._backend, self._batch)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def samplers(decoding: Decoding, seeds: Sequence[int], device: torch.device) -> LogitsProcessorList:
    """Processors of sampled decoding in their order; none for greedy decoding. GumbelMax must stay last."""
    processors = LogitsProcessorList()
    if decoding.temperature <= 0:
        return processors
    if decoding.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(decoding.temperature))
    if decoding.top_k > 0:
        processors.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1.0:
        processors.append(TopPLogitsWarper(decoding.top_p))
    processors.append(GumbelMax(seeds, device))
    return processors
