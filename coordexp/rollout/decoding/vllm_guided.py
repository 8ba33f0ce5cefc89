"""Guided decoding inside vLLM: `SamplingParams(extra_args={EXTRA_ARG: dataclasses.asdict(GuideRules(...))})`.

It does what vLLM's own structured output would, and more: see `coordexp.rollout.decoding.guided`. As a logits processor
it stands behind the log-probabilities, which are those of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from coordexp.rollout.decoding.guided import Guide, GuidedRow, GuideRules, guide_scores
from coordexp.rollout.decoding.vllm_rows import RowsProcessor, rows_index

EXTRA_ARG = "guided_answer"


class _Row:
    """One running request: its answer's state and the engine's own list of its answer, which grows."""

    def __init__(self, state: GuidedRow, output_ids: list[int]) -> None:
        self.state, self._output_ids = state, output_ids

    def caught_up(self) -> GuidedRow:
        """With what is new taken in."""
        new_ids = self._output_ids[self.state.num_tokens :]
        self.state.extend(token_id for token_id in new_ids if token_id >= 0)  # -1: not sampled yet
        return self.state


class VllmGuided(RowsProcessor[_Row]):
    """Leaves only the tokens with which the answer of a request stays one of its form; reads its coordinates too."""

    EXTRA_ARG = EXTRA_ARG

    def row(self, asked: Mapping[str, Any], output_ids: list[int]) -> _Row:
        rules = GuideRules(**asked)
        return _Row(GuidedRow(Guide.of(self.tokenizer(), rules), rules), output_ids)

    def apply(self, logits: Tensor) -> Tensor:
        """logits: [rows, V]."""
        if not self.rows:
            return logits
        places = sorted(self.rows)
        states = [self.rows[place].caught_up() for place in places]
        index = rows_index(places, logits.shape[0], logits.device)
        if index is None:
            return guide_scores(logits, states)
        logits[index] = guide_scores(logits[index], states)
        return logits
