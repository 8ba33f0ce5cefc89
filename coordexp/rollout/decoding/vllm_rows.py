"""Logits processors of ours inside vLLM: what they share, and the list an engine is started with.

A request asks for one with `SamplingParams(extra_args={its EXTRA_ARG: ...})`, so the classes work in any process of
the engine.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

Row = TypeVar("Row")

PROCESSORS = (
    "coordexp.rollout.decoding.vllm_repetition:VllmRepeatTermination",
    "coordexp.rollout.decoding.vllm_readout:VllmCoordReadout",
    "coordexp.rollout.decoding.vllm_guided:VllmGuided",
)
"""All of ours, for `logits_processors` of an engine."""


class RowsProcessor(LogitsProcessor, Generic[Row]):
    """A processor that keeps something for each running request that asked for it.

    rows: by the request's place in the batch.
    """

    EXTRA_ARG: str

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.rows: dict[int, Row] = {}
        self._tokenizer_path = vllm_config.model_config.tokenizer
        self._trust_remote_code = vllm_config.model_config.trust_remote_code
        self._tokenizer: Any = None

    @abstractmethod
    def row(self, asked: Any, output_ids: list[int]) -> Row:
        """What is kept for a request.

        asked: the request's value under `EXTRA_ARG`.  output_ids: the engine's own list of its answer, which grows.
        """

    @classmethod
    def asked(cls, params: SamplingParams) -> Any:
        """The request's value under `EXTRA_ARG`, None where it has none."""
        return (params.extra_args or {}).get(cls.EXTRA_ARG)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the rows of the batch; vLLM names removed, then added, then moved ones."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self.rows.pop(index, None)
        for index, params, _prompt_ids, output_ids in batch_update.added:
            self.rows.pop(index, None)
            asked = self.asked(params)
            if asked is not None:
                self.rows[index] = self.row(asked, output_ids)
        for source, target, direction in batch_update.moved:
            moved, replaced = self.rows.pop(source, None), self.rows.pop(target, None)
            if moved is not None:
                self.rows[target] = moved
            if replaced is not None and direction == MoveDirectionality.SWAP:
                self.rows[source] = replaced

    def tokenizer(self) -> Any:
        """That of the engine's model."""
        if self._tokenizer is None:
            self._tokenizer = AutoTokenizer.from_pretrained(
                self._tokenizer_path, trust_remote_code=self._trust_remote_code
            )
        return self._tokenizer


def rows_index(rows: Sequence[int], num_rows: int, device: torch.device) -> torch.Tensor | None:
    """An index of these rows of a batch; None when they are all of them in order."""
    return None if list(rows) == list(range(num_rows)) else torch.tensor(rows, device=device)
