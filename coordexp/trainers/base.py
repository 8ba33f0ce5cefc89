"""What all our trainers share: metrics in, one payload out."""

from __future__ import annotations

import logging
import math
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.config import derive, resolved_config, write_resolved
from coordexp.data.collator import with_supervised_rows
from coordexp.losses.columns import CoordColumns
from coordexp.metrics.accumulate import MetricStore
from coordexp.metrics.catalog import check_known
from coordexp.metrics.keys_run import NONFINITE_METRICS_TOTAL
from coordexp.metrics.payload import build_payload
from coordexp.metrics.sinks import MetricsSink, installed_versions
from coordexp.swift_bridge.trainer import SwiftTrainerBridge
from coordexp.trainers.finite import FiniteLossGuard
from coordexp.trainers.runtime import active

logger = logging.getLogger(__name__)


class CoordTrainer(SwiftTrainerBridge):
    """Owns the metric store, its payload sinks and the coordinate columns of the vocabulary."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.settings = active()
        template = kwargs["template"] if "template" in kwargs else args[2]
        self.vocab = CoordVocab.from_tokenizer(template.tokenizer)
        self.columns = CoordColumns(self.vocab.ids)
        super().__init__(*args, **kwargs)
        self.metrics = MetricStore()
        self._finite_guard = FiniteLossGuard()
        self._resolved = self._resolve()
        self._sink: MetricsSink | None = None
        self._reported_nonfinite: set[str] = set()
        if self.is_world_process_zero():
            write_resolved(self.args.output_dir, self._resolved)

    def _get_data_collator(self, args: Any, template: Any) -> Any:
        return with_supervised_rows(super()._get_data_collator(args, template), self.columns)

    def add_metrics(self, metrics: Mapping[str, tuple[Tensor | float, Tensor | float]]) -> None:
        """Put (sum, count) pairs into the window of the current mode. No host sync."""
        self.metrics.add_all(metrics, mode="train" if self.model.training else "eval")

    def window_metrics(self, mode: str) -> dict[str, float]:
        return self.metrics.flush(mode)

    def on_record(self, mode: str, record: dict[str, float]) -> None:
        check_known(record)
        numbers = {key: float(value) for key, value in record.items() if isinstance(value, (int, float))}
        payload = build_payload(mode, self.state.global_step, self._finite(numbers))
        if self._sink is None:
            meta = {"config_hash": self._resolved["config_hash"], "variant": self.settings.variant}
            self._sink = MetricsSink(self.args.output_dir, meta=meta)
        self._sink.write(payload)

    def _finite(self, numbers: dict[str, float]) -> dict[str, float]:
        """`numbers` without those the framework logged as NaN or infinite (an fp16 gradient norm, say), counted."""
        bad = {key: value for key, value in numbers.items() if not math.isfinite(value)}
        for key in bad.keys() - self._reported_nonfinite:
            logger.warning("%s is %s; left out of the payload (said once per key).", key, bad[key])
        self._reported_nonfinite |= bad.keys()
        kept = {key: value for key, value in numbers.items() if key not in bad}
        if bad:
            kept[NONFINITE_METRICS_TOTAL] = kept.get(NONFINITE_METRICS_TOTAL, 0.0) + len(bad)
        return kept

    def _resolve(self) -> dict[str, Any]:
        """The content of resolved_config.json."""
        args, settings = self.args, self.settings
        derived = derive(
            world_size=self.accelerator.num_processes,
            per_device_batch_size=args.per_device_train_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            num_train_samples=len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None,
            max_steps=args.max_steps,
            num_epochs=args.num_train_epochs,
            coord_token_ids=self.vocab.ids,
        )
        context = {"command": shlex.join(sys.argv), "versions": installed_versions()}
        return resolved_config(
            settings.variant, settings.sections, settings.swift, derived=derived, context=context
        )

    def stop_if_not_finite(self, terms: Mapping[str, Tensor]) -> None:
        """Watch the terms of a micro-batch; at the last one of a step, stop all ranks if any was not finite."""
        self._finite_guard.watch(terms)
        if self.accelerator.sync_gradients:
            self._finite_guard.check(self.state.global_step + 1)

    def sum_over_ranks(self, counts: Tensor) -> Tensor:
        """`counts` added up over all ranks when `average_tokens_across_devices` asks for it, else as they are."""
        if self.args.average_tokens_across_devices and dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        return counts

    @property
    def gradient_scale(self) -> float:
        """Undoes the averaging of gradients over ranks, for losses divided by counts of all ranks."""
        return float(self.accelerator.num_processes) if self.args.average_tokens_across_devices else 1.0


def accuracy(logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """Top-1 hits and rows. logits_RV: [R, V]; targets_R: int64 [R]."""
    hits = (logits_RV.argmax(dim=-1) == targets_R).sum()
    return hits.float(), torch.full_like(hits, targets_R.numel()).float()
