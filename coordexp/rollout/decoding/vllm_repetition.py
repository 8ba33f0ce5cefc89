"""Repeat-aware termination inside vLLM.

A request asks for it with `SamplingParams(extra_args={EXTRA_ARG: RepeatTerminate.model_dump() | {"end_id": id of
<|im_end|>}})`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from coordexp.codec.pieces import pieces_of
from coordexp.config.schema.rollout import RepeatTerminate
from coordexp.rollout.decoding.repetition import RepeatDetector, force_token
from coordexp.rollout.decoding.vllm_rows import RowsProcessor

EXTRA_ARG = "repeat_terminate"


class _Row:
    """One running request: its detector and the engine's own list of its answer, which grows."""

    def __init__(self, detector: RepeatDetector, end_id: int, output_ids: list[int]) -> None:
        self.detector, self.end_id, self.output_ids = detector, end_id, output_ids

    def triggered(self) -> bool:
        """Take in what is new and decide."""
        new_ids = self.output_ids[self.detector.num_tokens :]
        self.detector.extend(token_id for token_id in new_ids if token_id >= 0)  # -1: not sampled yet
        return self.detector.triggered


class VllmRepeatTermination(RowsProcessor[_Row]):
    """Leaves `<|im_end|>` as the only choice of requests whose answers repeat themselves."""

    EXTRA_ARG = EXTRA_ARG

    def row(self, asked: Mapping[str, Any], output_ids: list[int]) -> _Row:
        settings = dict(asked)
        end_id = settings.pop("end_id")
        rules = RepeatTerminate(**settings)
        pieces = None if rules.max_object_keys is None else pieces_of(self.tokenizer())
        return _Row(RepeatDetector(rules, pieces.__getitem__ if pieces else None), end_id, output_ids)

    def apply(self, logits: Tensor) -> Tensor:
        """logits: [rows, V]."""
        for index, row in self.rows.items():
            if row.triggered():
                force_token(logits, [index], row.end_id)
        return logits
