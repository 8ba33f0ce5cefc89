"""Repeat-aware termination inside vLLM.

The engine is started with `logits_processors=[PROCESSOR]`; a request asks for it with
`SamplingParams(extra_args={EXTRA_ARG: RepeatTerminate.model_dump() | {"end_id": id of <|im_end|>}})`, so the class
works in any process of the engine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from coordexp.codec.pieces import TokenPieces, pieces_of
from coordexp.config.schema.rollout import RepeatTerminate
from coordexp.rollout.decoding.repetition import RepeatDetector, force_token

PROCESSOR = "coordexp.rollout.decoding.vllm_repetition:VllmRepeatTermination"
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


class VllmRepeatTermination(LogitsProcessor):
    """Leaves `<|im_end|>` as the only choice of requests whose answers repeat themselves."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._tokenizer_path = vllm_config.model_config.tokenizer
        self._trust_remote_code = vllm_config.model_config.trust_remote_code
        self._tokenizer: Any = None
        self._rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the rows of the batch; vLLM names removed, then added, then moved ones."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, _prompt_ids, output_ids in batch_update.added:
            self._rows.pop(index, None)
            asked = (params.extra_args or {}).get(EXTRA_ARG)
            if asked is not None:
                self._rows[index] = self._row(dict(asked), output_ids)
        for source, target, direction in batch_update.moved:
            moved, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if replaced is not None and direction == MoveDirectionality.SWAP:
                self._rows[source] = replaced

    def apply(self, logits: Tensor) -> Tensor:
        """logits: [rows, V]."""
        for index, row in self._rows.items():
            if row.triggered():
                force_token(logits, [index], row.end_id)
        return logits

    def _row(self, asked: dict[str, Any], output_ids: list[int]) -> _Row:
        end_id = asked.pop("end_id")
        rules = RepeatTerminate(**asked)
        pieces = None if rules.max_object_keys is None else self._pieces()
        return _Row(RepeatDetector(rules, pieces.__getitem__ if pieces else None), end_id, output_ids)

    def _pieces(self) -> TokenPieces:
        if self._tokenizer is None:
            self._tokenizer = AutoTokenizer.from_pretrained(
                self._tokenizer_path, trust_remote_code=self._trust_remote_code
            )
        return pieces_of(self._tokenizer)
