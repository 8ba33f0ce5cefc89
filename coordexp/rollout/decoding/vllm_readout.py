"""Coordinates read from their distribution inside vLLM: `SamplingParams(extra_args={EXTRA_ARG: "median"})`."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.config.schema.rollout import Readout
from coordexp.losses.columns import CoordColumns
from coordexp.rollout.decoding.readout import force_readout
from coordexp.rollout.decoding.vllm_rows import RowsProcessor, rows_index

EXTRA_ARG = "coord_readout"


class VllmCoordReadout(RowsProcessor[Readout]):
    """Writes coordinates as each request asked to read them; nothing of it depends on the answer so far."""

    EXTRA_ARG = EXTRA_ARG

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        self._columns: CoordColumns | None = None
        self._groups: list[tuple[Readout, list[int]]] = []

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """ValueError for a readout that does not exist (vLLM asks when a request comes in)."""
        asked = cls.asked(sampling_params)
        if asked is not None and asked not in get_args(Readout):
            raise ValueError(f"{EXTRA_ARG} is {asked!r}: expected one of {', '.join(get_args(Readout))}")

    def row(self, asked: Readout, output_ids: list[int]) -> Readout:
        return asked

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        super().update_state(batch_update)
        if batch_update is not None:
            ways = sorted(set(self.rows.values()))
            self._groups = [(how, sorted(i for i, way in self.rows.items() if way == how)) for how in ways]

    def apply(self, logits: Tensor) -> Tensor:
        """logits: [rows, V]."""
        for how, rows in self._groups:
            index = rows_index(rows, logits.shape[0], logits.device)
            if index is None:
                force_readout(logits, self._coord_columns(), how)
            else:
                logits[index] = force_readout(logits[index], self._coord_columns(), how)
        return logits

    def _coord_columns(self) -> CoordColumns:
        if self._columns is None:
            self._columns = CoordColumns(CoordVocab.from_tokenizer(self.tokenizer()).ids)
        return self._columns
